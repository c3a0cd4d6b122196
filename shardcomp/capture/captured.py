"""What a capture finds of a call, whichever of its results a Program wants, and how that is written to a file and read back.

A file is JSON and holds no code. It names operators of ATen, result types of transformers, and sizes as trees of sympy's and
torch's own functions; anything else in it is refused.
"""

from __future__ import annotations

import base64
import importlib
import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from shardcomp.ir.program import B, Body, Degraded, S, Value
from shardcomp.kernels.attention import attention
from shardcomp.torch_private import OpOverload, size_functions


@dataclass(frozen=True)
class Captured:
    """One call as a graph with all results that were asked for together.

    body: nothing is known in it of gradients, which depend on what is frozen. outputs: the names of its results. output_type:
    the type of the model's own result. constants: tensors outside of the model's parameters and buffers that the graph reads,
    by the name of their placeholder. static_shape: (b, s) where the graph holds for that one shape only. degraded: what was
    given up for it.
    """

    body: Body
    outputs: tuple[str, ...]
    output_type: Callable[..., Any]
    constants: Mapping[str, Tensor]
    static_shape: tuple[int, int] | None
    degraded: tuple[Degraded, ...]


class Unwritable(Exception):
    """Something that has no form in a file, or a file that this version does not read."""


def write(captured: Captured) -> str:
    """The text of a file. Raises Unwritable where a part of it has no form there, or would not be read as it was."""
    content = _Writer().write(captured)
    text = json.dumps(content, separators=(",", ":"))
    if _Writer().write(read(text)) != content:
        raise Unwritable("a size is simplified when it is read")
    return text


def read(text: str) -> Captured:
    """What a file holds. Raises Unwritable for a file that `write` did not make."""
    try:
        return _Reader(json.loads(text)).read()
    except (ValueError, LookupError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise Unwritable(f"{type(error).__name__}: {error}") from error


_FUNCTIONS: dict[str, Any] = {"getitem": operator.getitem, "attention": attention}
"""The targets of calls that are no operators of ATen."""
_NAMES_OF = {function: name for name, function in _FUNCTIONS.items()}
_SYMBOLS = {"b": B, "s": S}
_SIZES = (
    *("Add", "Mul", "Pow", "Max", "Min", "Mod", "floor", "ceiling", "Piecewise", "And", "Or", "Not"),
    *("Equality", "Unequality", "StrictLessThan", "LessThan", "StrictGreaterThan", "GreaterThan"),
)
"""Functions of sympy that a size may be made of; torch has more of its own."""
_SETTINGS = {torch.dtype: "dtype", torch.layout: "layout", torch.memory_format: "memory_format"}


class _Writer:
    """Each distinct value is written once and named by its number."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}
        self.nodes: dict[fx.Node, int] = {}

    def write(self, captured: Captured) -> dict[str, Any]:
        nodes = [self._node(node) for node in captured.body.graph.nodes if node.op != "output"]
        return {
            "name": captured.body.name,
            "nodes": nodes,
            "results": [self._any(result) for result in captured.body.results],
            "values": [json.loads(value) for value in self.values],
            "outputs": list(captured.outputs),
            "output_type": _name_of(captured.output_type),
            "constants": {name: _tensor(constant) for name, constant in captured.constants.items()},
            "static_shape": list(captured.static_shape) if captured.static_shape else None,
            "degraded": [[entry.what, entry.why] for entry in captured.degraded],
        }

    def _node(self, node: fx.Node) -> dict[str, Any]:
        meta = {key: entry for key, entry in node.meta.items() if key != "value"}
        if not all(isinstance(entry, (str, bool)) for entry in meta.values()):
            raise Unwritable(f"{node.name} has {meta}")
        written: dict[str, Any] = {"name": node.name, "meta": meta, "value": self._number(node.meta["value"])}
        if node.op == "call_function":
            written["target"] = _target(node.target)
            written["args"] = [self._any(argument) for argument in node.args]
            written["kwargs"] = {name: self._any(argument) for name, argument in node.kwargs.items()}
        elif node.op == "placeholder":
            written["argument"] = str(node.target)
        else:
            raise Unwritable(f"{node.name} is a node of the kind {node.op}")
        self.nodes[node] = len(self.nodes)
        return written

    def _number(self, value: Any) -> int:
        return self.values.setdefault(json.dumps(self._any(value)), len(self.values))

    def _any(self, argument: Any) -> Any:
        """Plain numbers, texts and None as they are, and anything else as {its kind: what it holds}."""
        if argument is None or type(argument) in (bool, int, float, str):
            return argument
        if type(argument) in (list, tuple, fx.immutable_collections.immutable_list):
            return {"tuple" if isinstance(argument, tuple) else "list": [self._any(entry) for entry in argument]}
        if isinstance(argument, fx.Node):
            return {"node": self.nodes[argument]}
        if isinstance(argument, Value):
            return {"value": [[self._any(size) for size in argument.shape], str(argument.dtype).removeprefix("torch.")]}
        if isinstance(argument, torch.device):
            return {"device": str(argument)}
        if type(argument) in _SETTINGS:
            return {_SETTINGS[type(argument)]: str(argument).removeprefix("torch.")}
        if isinstance(argument, sympy.Basic):
            return {"size": _size(argument)}
        raise Unwritable(f"{type(argument).__name__} {argument}")


class _Reader:
    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content
        self.nodes: list[fx.Node] = []
        self.values = [self._any(value) for value in content["values"]]

    def read(self) -> Captured:
        graph = fx.Graph()
        for entry in self.content["nodes"]:
            self.nodes.append(self._node(graph, entry))
        graph.output(tuple(self._any(result) for result in self.content["results"]))
        shape = self.content["static_shape"]
        return Captured(
            Body(self.content["name"], graph),
            tuple(self.content["outputs"]),
            _type(self.content["output_type"]),
            {name: _read_tensor(*constant) for name, constant in self.content["constants"].items()},
            (shape[0], shape[1]) if shape else None,
            tuple(Degraded(what, why) for what, why in self.content["degraded"]),
        )

    def _node(self, graph: fx.Graph, entry: dict[str, Any]) -> fx.Node:
        if "target" in entry:
            args = tuple(self._any(argument) for argument in entry["args"])
            kwargs = {name: self._any(argument) for name, argument in entry["kwargs"].items()}
            node = graph.create_node("call_function", _read_target(entry["target"]), args, kwargs, entry["name"])
        else:
            node = graph.create_node("placeholder", entry["argument"], name=entry["name"])
        node.meta = {"value": self.values[entry["value"]], **entry["meta"]}
        return node

    def _any(self, written: Any) -> Any:
        if not isinstance(written, dict):
            return written
        [(kind, content)] = written.items()
        match kind:
            case "tuple":
                return tuple(self._any(entry) for entry in content)
            case "list":
                return [self._any(entry) for entry in content]
            case "node":
                return self.nodes[content]
            case "value":
                shape, dtype = content
                return Value(tuple(self._any(size) for size in shape), _setting("dtype", dtype))
            case "device":
                return torch.device(content)
            case "size":
                return _read_size(content)
        return _setting(kind, content)


def _setting(kind: str, name: str) -> Any:
    setting = getattr(torch, name)
    if _SETTINGS.get(type(setting)) != kind:
        raise Unwritable(f"torch has no {kind} {name}")
    return setting


def _target(target: Any) -> str:
    if isinstance(target, OpOverload) and target.namespace in ("aten", "prims"):
        return str(target)
    if target in _NAMES_OF:
        return _NAMES_OF[target]
    raise Unwritable(f"a call of {target}")


def _read_target(name: str) -> Any:
    if name in _FUNCTIONS:
        return _FUNCTIONS[name]
    namespace, packet, overload = name.split(".")
    if namespace not in ("aten", "prims"):
        raise Unwritable(f"a call of {name}")
    target = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    if not isinstance(target, OpOverload):
        raise Unwritable(f"a call of {name}")
    return target


def _size(size: sympy.Basic) -> Any:
    if size in (B, S):
        return str(size)
    if isinstance(size, sympy.Integer):
        return int(size)
    if isinstance(size, sympy.Rational):
        return ["Rational", int(size.p), int(size.q)]
    if isinstance(size, sympy.Float):
        return float(size)
    if size in (sympy.true, sympy.false):
        return bool(size)
    name = next((name for name, function in _functions().items() if type(size) is function), None)
    if not size.args or name is None:
        raise Unwritable(f"the size {size}")
    return [name, *(_size(argument) for argument in size.args)]


def _read_size(written: Any) -> Any:
    if isinstance(written, str):
        return _SYMBOLS[written]
    if isinstance(written, list):
        name, *arguments = written
        return _functions()[name](*(_read_size(argument) for argument in arguments))
    return sympy.sympify(written) if isinstance(written, bool) else sympy.Number(written)


@cache
def _functions() -> dict[str, Any]:
    """What a size may be made of: name -> function. Those of torch have names that begin with `torch.`."""
    theirs = {f"torch.{name}": getattr(size_functions, name) for name in size_functions.__all__}
    return {name: getattr(sympy, name) for name in ("Rational", *_SIZES)} | theirs


def _name_of(output_type: Any) -> str:
    name = f"{output_type.__module__}:{output_type.__qualname__}"
    if _type(name) is not output_type:
        raise Unwritable(f"a result of the type {name}")
    return name


def _type(name: str) -> Any:
    module, _, qualname = name.partition(":")
    if module.partition(".")[0] == "transformers" and qualname.isidentifier():
        found = getattr(importlib.import_module(module), qualname, None)
        if isinstance(found, type):
            return found
    raise Unwritable(f"a result of the type {name}")


_LARGEST_CONSTANT = 1 << 20
"""Bytes. A larger tensor is not worth its place in a file."""


def _tensor(constant: Tensor) -> list[Any]:
    content = constant.detach().to("cpu").contiguous()
    if constant.is_meta or content.nbytes > _LARGEST_CONSTANT or content.layout != torch.strided:
        raise Unwritable(f"a constant of {content.nbytes} bytes")
    raw = content.reshape(-1).view(torch.uint8).numpy().tobytes()
    return [str(content.dtype).removeprefix("torch."), list(content.shape), base64.b64encode(raw).decode()]


def _read_tensor(dtype: str, shape: list[int], raw: str) -> Tensor:
    content = bytearray(base64.b64decode(raw))
    numbers = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    return numbers.view(_setting("dtype", dtype)).reshape(shape)
