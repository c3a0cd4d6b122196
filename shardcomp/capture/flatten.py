"""An exported program as one flat, pure graph: wrappers inlined, sizes as expressions in B and S, no operator in place."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from shardcomp.capture.functionalize import NoValue, Writes, pure_form, written
from shardcomp.errors import CaptureError
from shardcomp.ir.nodes import path_of, role_of, tensor_arguments
from shardcomp.ir.operators import operator_of
from shardcomp.ir.program import BUFFER, INPUT, PARAMETER, B, Body, Parameter, S, Value
from shardcomp.kernels.attention import RECORDED, SETTINGS, attention
from shardcomp.torch_private import FakeTensor, HigherOrderOperator, tree_leaves, tree_map, tree_map_only

aten = torch.ops.aten

_ROLES = {
    InputKind.USER_INPUT: INPUT,
    InputKind.PARAMETER: PARAMETER,
    InputKind.BUFFER: BUFFER,
    InputKind.CONSTANT_TENSOR: BUFFER,
}
_TORCH = str(Path(torch.__file__).parent)
_MAKES_NO_GRADIENT = {"detach", "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"}


def flatten(
    exported: ExportedProgram,
    parameters: Mapping[str, Parameter],
    known: Mapping[str, tuple[str, str]] = MappingProxyType({}),
) -> Body:
    """The exported graph as a Body.

    Placeholders come inputs first, then parameters, then buffers; a tied weight is one placeholder under its first name. Every
    call has `value`, `path` (its module), `source` (the model's file and line) and, if it was made under no_grad, `no_grad`.
    Nothing is known yet of gradients, see `mark_gradients`.

    known: the constants of the export that are parameters or buffers, name -> (role, name). Raises CaptureError for what has no
    place in such a graph.
    """
    return _Flattening(exported, parameters, known).body


def with_results(body: Body, wanted: Sequence[bool]) -> Body:
    """A copy of a body that computes some of its results only."""
    copy = body.copy()
    output = copy.output
    output.args = (tuple(compress(copy.results, wanted)),)
    _drop_dead(copy.graph)
    return copy


class _Flattening:
    def __init__(
        self,
        exported: ExportedProgram,
        parameters: Mapping[str, Parameter],
        known: Mapping[str, tuple[str, str]],
    ) -> None:
        self.graph = fx.Graph()
        self.sizes: dict[sympy.Symbol, sympy.Symbol] = {}
        self.meta: dict[str, Any] = {}
        self.parameters = parameters
        self.writes = Writes(self._emit)
        env = self._placeholders(exported, known)
        results = self._inline(exported.graph_module, env, {})
        self.graph.output(tuple(self._now(results)))
        _drop_dead(self.graph)
        self.body = Body("Model", self.graph)

    def _placeholders(self, exported: ExportedProgram, known: Mapping[str, tuple[str, str]]) -> dict[fx.Node, Any]:
        # A tied weight may come under any of its names.
        first_names = {alias: p.name for p in self.parameters.values() for alias in p.aliases}
        nodes = [node for node in exported.graph.nodes if node.op == "placeholder"]
        env: dict[fx.Node, Any] = {}
        entries_of: dict[str, list[tuple[fx.Node, str]]] = {INPUT: [], PARAMETER: [], BUFFER: []}
        for node, spec in zip(nodes, exported.graph_signature.input_specs, strict=True):
            if spec.kind not in _ROLES:
                raise CaptureError(f"the model takes {node.name}, which is not a tensor ({spec.kind.name})")
            role = _ROLES[spec.kind]
            # use_cache = False and the like are numbers in the graph.
            if role == INPUT and not isinstance(node.meta.get("val"), Tensor):
                env[node] = node.meta.get("val")
                continue
            name = node.name if role == INPUT else str(spec.target)
            if spec.kind == InputKind.CONSTANT_TENSOR:
                role, name = known.get(name, (role, name))
            entries_of[role].append((node, first_names.get(name, name)))
        for node, _ in entries_of[INPUT]:
            # torch has symbols of its own, such as s0. All inputs are [b, s].
            for size, symbol in zip(node.meta["val"].shape, (B, S), strict=False):
                if isinstance(size, torch.SymInt) and isinstance(size.node.expr, sympy.Symbol):
                    self.sizes.setdefault(size.node.expr, symbol)
        placeholders: dict[str, fx.Node] = {}
        for role, entries in entries_of.items():
            for node, name in entries:
                if name not in placeholders:
                    placeholders[name] = self.graph.placeholder(re.sub(r"\W", "_", name))
                    placeholders[name].meta = {"role": role, "path": name, "value": self._value(node.meta["val"], node)}
                env[node] = placeholders[name]
        return env

    def _inline(self, module: fx.GraphModule, env: dict[fx.Node, Any], extra: dict[str, Any]) -> list[Any]:
        """Copy the nodes of `module`; `env` maps its nodes to copies and sizes. Returns its results."""
        for node in module.graph.nodes:
            if node.op == "output":
                return [self._map(result, env) for result in node.args[0]]
            # The graph inside a wrapper such as no_grad.
            if node.op == "get_attr":
                env[node] = getattr(module, str(node.target))
            elif node.op == "call_function":
                env[node] = self._call(node, env, extra)
        raise AssertionError("a graph without an output")

    def _call(self, node: fx.Node, env: dict[fx.Node, Any], extra: dict[str, Any]) -> Any:
        name = getattr(node.target, "__name__", str(node.target))
        if name in ("wrap_with_set_grad_enabled", "wrap_with_autocast"):
            return self._wrapper(node, env, extra, name)
        if isinstance(node.target, HigherOrderOperator):
            raise CaptureError(f"{_where(node)}: a call of {name}, which has no place in a flat graph")
        known = node.meta.get("val")
        if known is None:
            return None  # an assertion about shapes or metadata
        # Arithmetic on sizes, such as s // 2, is an expression and no call.
        if not _has_tensor(known):
            return self._size(known, node)
        source = self._map(node.args[0], env) if node.args else None
        # One of the results of a wrapper, which is inlined already, or of a call with several `out=`.
        if name == "getitem" and isinstance(source, (list, tuple)):
            return source[node.args[1]]  # type: ignore[index]
        # For all calls that this one becomes: a write in place may become several.
        self.meta = {"path": _module_path(node), "source": _source(node), **extra}
        try:
            changed = written(node.target)
            if changed and changed[0] in node.kwargs:
                return self._write_out(node, env, changed)
            args, kwargs = (self._now(self._map(arguments, env)) for arguments in (node.args, node.kwargs))
            if changed:
                # `Writes` knows operators that change only their first argument, as `add_` does.
                if changed != (node.target._schema.arguments[0].name,):  # type: ignore[union-attr]
                    raise NoValue
                self.writes.write(node.target, source, args[1:], kwargs)
                return source
        except NoValue as refused:
            raise CaptureError(f"{_where(node)}: {node.target} {_what_it_changes(refused.placeholder)}") from None
        target: Any = node.target
        if target is RECORDED:
            target, args, kwargs = _attention_call(args, kwargs)
        copy = self._emit(target, args, kwargs, tree_map(lambda result: self._value(result, node), _results(known)))
        self.writes.note(copy, source)
        return copy

    def _write_out(self, node: fx.Node, env: dict[fx.Node, Any], names: tuple[str, ...]) -> Any:
        """A call with `out=`: its pure form, whose results are what the tensors that it writes to hold from here on."""
        pure = pure_form(node.target)
        outs = [self._map(node.kwargs[name], env) for name in names]
        if pure is None:
            raise NoValue(next((out for out in outs if isinstance(out, fx.Node) and out.op == "placeholder"), None))
        rest = {key: argument for key, argument in node.kwargs.items() if key not in names}
        args, kwargs = (self._now(self._map(arguments, env)) for arguments in (node.args, rest))
        # What the pure form gives may be of another dtype or size than what it is written to.
        fakes = fx.map_arg((node.args, rest), lambda argument: argument.meta["val"])
        with node.meta["val"].fake_mode if isinstance(node.meta["val"], FakeTensor) else node.meta["val"][0].fake_mode:
            results = pure(*fakes[0], **fakes[1])
        values = tree_map(lambda result: self._value(result, node), _results(results))
        call = self._emit(pure, args, kwargs, values)
        if len(outs) == 1:
            self.writes.put(outs[0], call)
            return outs[0]
        for index, out in enumerate(outs):
            self.writes.put(out, self._emit(operator.getitem, (call, index), {}, values[index]))
        return tuple(outs)

    def _emit(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], known: Any) -> fx.Node:
        copy = self.graph.call_function(target, args, kwargs)
        copy.meta = {"value": known, **self.meta}
        return copy

    def _now(self, argument: Any) -> Any:
        """What the tensors among some arguments hold by now."""
        return tree_map_only(fx.Node, self.writes.newest, argument)

    def _wrapper(self, node: fx.Node, env: dict[fx.Node, Any], extra: dict[str, Any], name: str) -> list[Any]:
        """The body of `with torch.set_grad_enabled(…)` or `with torch.autocast(…)`."""
        if name == "wrap_with_autocast":
            # A model may turn autocast off, as GPT-2 does around its scores. That changes nothing here.
            _, _, enabled, _, inner, *operands = (self._map(argument, env) for argument in node.args)
            if enabled:
                first = next((n for n in inner.graph.nodes if n.op == "call_function"), node)
                raise CaptureError(f"{_where(first)}: the model turns autocast on, which leaves no trace in a graph")
        else:
            enabled, inner, *operands = (self._map(argument, env) for argument in node.args)
            # enable_grad inside no_grad ends it.
            extra = {key: setting for key, setting in extra.items() if key != "no_grad"} | (
                {} if enabled else {"no_grad": True}
            )
        placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
        return self._inline(inner, dict(zip(placeholders, operands, strict=True)), extra)

    def _map(self, argument: Any, env: dict[fx.Node, Any]) -> Any:
        if isinstance(argument, fx.Node):
            return env[argument]
        if isinstance(argument, (tuple, list)):
            return type(argument)(self._map(entry, env) for entry in argument)
        if isinstance(argument, dict):
            return {key: self._map(entry, env) for key, entry in argument.items()}
        return argument

    def _value(self, result: Any, node: fx.Node) -> Any:
        if not isinstance(result, Tensor):
            return result
        return Value(tuple(self._size(size, node) for size in result.shape), result.dtype)

    def _size(self, size: Any, node: fx.Node) -> Any:
        """A number that the graph computes: itself, or an expression in B and S."""
        if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return size
        expr = size.node.expr.xreplace(self.sizes)
        if expr.free_symbols - {B, S}:
            raise CaptureError(f"{_where(node)}: a size depends on the data")
        if expr.is_Integer:
            return int(expr)
        return float(expr) if expr.is_number else expr


def mark_gradients(body: Body, parameters: Mapping[str, Parameter]) -> None:
    """Write into every value whether a gradient flows into it: it is floating and comes from a parameter that needs one."""
    for node in body.graph.nodes:
        if node.op == "placeholder":
            flows = role_of(node) == PARAMETER and parameters[path_of(node)].requires_grad
        elif node.op == "call_function":
            packet = operator_of(node)
            name = getattr(packet, "__name__", "")
            # new_zeros(x, …) takes dtype and device from x, but no numbers.
            blocked = node.meta.get("no_grad") or name in _MAKES_NO_GRADIENT or name.startswith("new_")
            flows = not blocked and any(_needs_gradient(argument) for argument in tensor_arguments(node))
        else:
            continue
        known = node.meta["value"]
        node.meta["value"] = tree_map_only(Value, lambda v, flows=flows: replace(v, requires_grad=flows and v.floating), known)


def _needs_gradient(node: fx.Node) -> bool:
    return any(isinstance(tensor, Value) and tensor.requires_grad for tensor in tree_leaves(node.meta["value"]))


def _results(known: Any) -> Any:
    return tuple(known) if isinstance(known, (list, tuple)) else known


def _has_tensor(known: Any) -> bool:
    return any(isinstance(result, Tensor) for result in tree_leaves(known))


def _attention_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The recorded operator as a call of its Python function, without the arguments that are left at their defaults."""
    settings = dict(zip(SETTINGS, args[3:], strict=False)) | kwargs
    return attention, args[:3], {name: setting for name, setting in settings.items() if setting != SETTINGS[name]}


def _what_it_changes(placeholder: fx.Node | None) -> str:
    """Why a write in place is refused, and what would do."""
    if placeholder is None:
        return "changes a tensor in place that other tensors may share, or reads such a one"
    role, path = role_of(placeholder), path_of(placeholder)
    if role == INPUT:
        return f"changes the input {path} in place: change a copy of it"
    module, _, name = path.rpartition(".")
    what = f"changes the {role} {name} of {module or 'the model'} in place, and a sharded model changes none in a forward"
    if ".parametrizations." in f".{path}":
        owner = module.partition("parametrizations.")[0].rstrip(".") or "the model"
        what += f": remove the parametrization of {owner} before sharding (torch.nn.utils.parametrize), or"
    else:
        what += ":"
    return f"{what} compute it without changes in place, or put the module in eval mode if it changes nothing there"


def _drop_dead(graph: fx.Graph) -> None:
    """Remove calls that nothing reads."""
    # Readers first, so that what only they read is dead as well.
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)


def _module_path(node: fx.Node) -> str:
    """The innermost module that a call was made in; the root is ""."""
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    # torch writes `layer@1` where a module is called a second time.
    path = re.sub(r"@\d+", "", path)
    return "" if path.startswith("_empty_nn_module_stack") else path


def _source(node: fx.Node) -> str:
    """`file.py:line` of the model."""
    places = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    own = [place for place in places if not place[0].startswith(_TORCH)] or places
    return f"{Path(own[-1][0]).name}:{own[-1][1]}" if own else ""


def _where(node: fx.Node) -> str:
    return ", ".join(part for part in (_module_path(node) or "the model", _source(node)) if part)
