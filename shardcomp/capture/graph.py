"""An exported program as a Program of one unit: roles, sizes in b and s, module paths; regions without gradient laid open."""

from __future__ import annotations

import operator
import re
from typing import Any

import sympy
import torch
from torch import fx, nn

from shardcomp.errors import CaptureError
from shardcomp.program import BUFFER, INPUT, PARAMETER, B, Body, S, Value, tensor_arguments

_REGIONS = ("wrap_with_set_grad_enabled", "wrap_with_autocast")


class Conversion:
    """Copies exported nodes into one flat graph. `inputs` names the caller's tensors; `names` maps placeholders to the model's."""

    def __init__(self, exported: Any, inputs: list[str], trainable: dict[str, bool], static: bool) -> None:
        self.exported, self.inputs, self.trainable = exported, inputs, trainable
        signature = exported.graph_signature
        self.parameters: dict[str, str] = dict(signature.inputs_to_parameters)
        self.buffers: dict[str, str] = dict(signature.inputs_to_buffers)
        self.constants: dict[str, str] = dict(signature.inputs_to_lifted_tensor_constants)
        self.graph = fx.Graph()
        self.made: dict[fx.Node, Any] = {}
        self.symbols: dict[sympy.Symbol, sympy.Symbol] = {}
        self.no_gradient = False
        self.static = static

    def body(self) -> Body:
        """The flat body; its results are the exported outputs in order."""
        self._name_sizes()
        results = self._copy(self.exported.graph, self.exported.graph_module)
        self.graph.output(tuple(results))
        return Body("Model", self.graph)

    def _name_sizes(self) -> None:
        """The symbols that the export gave to batch and length, from the first input that has both."""
        for node in self.exported.graph.nodes:
            if node.op == "placeholder" and node.name in self.inputs and not self.static:
                for size, symbol in zip(node.meta["val"].shape[:2], (B, S), strict=True):
                    if isinstance(size, torch.SymInt):
                        self.symbols.setdefault(size.node.expr, symbol)

    def size(self, held: Any) -> Any:
        """A size in b and s; an int where it is one."""
        if not isinstance(held, torch.SymInt):
            return held
        expr = sympy.sympify(held.node.expr).subs(self.symbols)
        left = expr.free_symbols - {B, S}
        if left:
            raise CaptureError(f"a size depends on {', '.join(map(str, left))}, which is neither batch nor length: data-dependent")
        return int(expr) if expr.is_Integer else expr

    def value(self, held: Any, requires_grad: bool) -> Any:
        """What is known of an exported value."""
        if isinstance(held, torch.Tensor):
            shape = tuple(self.size(size) for size in held.shape)
            return Value(shape, held.dtype, requires_grad and held.dtype.is_floating_point)
        if isinstance(held, (tuple, list)):
            return tuple(self.value(each, requires_grad) for each in held)
        return self.size(held)

    def _copy(self, graph: fx.Graph, owner: nn.Module) -> list[Any]:
        for node in graph.nodes:
            if node.op == "placeholder":
                if node not in self.made:
                    self._placeholder(node)
            elif node.op == "get_attr":
                self.made[node] = getattr(owner, str(node.target))
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                return [self.made.get(a, a) if isinstance(a, fx.Node) else a for a in node.args[0]]
        raise CaptureError("the exported graph has no output")

    def _placeholder(self, node: fx.Node) -> None:
        name = node.name
        for names, role in ((self.parameters, PARAMETER), (self.buffers, BUFFER), (self.constants, BUFFER)):
            if name in names:
                path = names[name]
                break
        else:
            if name not in self.inputs:
                self.made[node] = None
                return
            path, role = name, INPUT
        copy = self.graph.placeholder(name)
        trained = role == PARAMETER and self.trainable.get(path, True)
        copy.meta = {"role": role, "path": path, "value": self.value(node.meta["val"], trained)}
        self.made[node] = copy

    def _call(self, node: fx.Node) -> None:
        held = node.meta.get("val")
        kind = getattr(node.target, "__name__", str(node.target))
        if isinstance(held, (torch.SymInt, int)) and not isinstance(held, bool):
            self.made[node] = self.size(held)
            return
        if any(region in str(node.target) for region in _REGIONS):
            self._region(node)
            return
        if node.target is operator.getitem and isinstance(self.made[node.args[0]], list):
            self.made[node] = self.made[node.args[0]][node.args[1]]
            return
        if held is None and ("assert" in kind or "sym_constrain" in kind or kind == "_guards_fn"):
            return
        copy = self.graph.node_copy(node, lambda n: self.made[n])
        graded = not self.no_gradient and any(_requires_grad(argument) for argument in tensor_arguments(copy))
        source = _source_line(node.meta.get("stack_trace"))
        copy.meta = {"value": self.value(held, graded), "path": _path(node), "source": source, "no_gradient": self.no_gradient}
        self.made[node] = copy

    def _region(self, node: fx.Node) -> None:
        """Lay a wrapped region open: its nodes stand among the others, marked where no gradient is taken."""
        position = next(i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and a.op == "get_attr")
        inner = self.made[node.args[position]]
        outer = self.no_gradient
        if "set_grad" in str(node.target):
            self.no_gradient = not node.args[0]
        holes = [n for n in inner.graph.nodes if n.op == "placeholder"]
        for hole, argument in zip(holes, node.args[position + 1 :], strict=True):
            self.made[hole] = self.made[argument] if isinstance(argument, fx.Node) else argument
        self.made[node] = self._copy(inner.graph, inner)
        self.no_gradient = outer


def _requires_grad(node: fx.Node) -> bool:
    held = node.meta["value"]
    return any(v.requires_grad for v in (held if isinstance(held, tuple) else (held,)) if isinstance(v, Value))


def _path(node: fx.Node) -> str:
    """The path of the innermost module that a node comes from; "" for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    return "" if path.startswith("_empty") else re.sub(r"@\d+$", "", path)


def _source_line(trace: str | None) -> str | None:
    """`file:line` of the last line of the model's own code in a stack trace."""
    found = re.findall(r'File "([^"]+)", line (\d+)', trace or "")
    return f"{found[-1][0]}:{found[-1][1]}" if found else None
