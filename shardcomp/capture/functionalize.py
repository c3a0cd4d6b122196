"""Writes in place as new values: which tensors of a graph share memory, and what each of them is after a write."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from shardcomp.ir import operators
from shardcomp.ir.layout import same
from shardcomp.ir.nodes import has_one_result, value
from shardcomp.ir.operators import is_item, operator_of, without_overload
from shardcomp.ir.program import Value

aten = torch.ops.aten

_UNCLEAR = operators.with_fact("may_copy")


class NoValue(Exception):
    """A write whose effect cannot be said in values. placeholder: the input, parameter or buffer that it changes, if any."""

    def __init__(self, placeholder: fx.Node | None = None) -> None:
        super().__init__()
        self.placeholder = placeholder


def written(target: Any) -> tuple[str, ...]:
    """The names of the arguments that an operator writes to, by its schema: `self` of `add_`, `out` of `add.out`."""
    schema = getattr(target, "_schema", None)
    return tuple(a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write) if schema is not None else ()


def pure_form(target: Any) -> Any:
    """The overload that returns what an overload with `out=` writes: it has the same arguments without those. Else None."""
    outs = written(target)
    arguments = [(a.name, str(a.type)) for a in target._schema.arguments if a.name not in outs]
    packet = without_overload(target)
    for name in packet.overloads():
        other = getattr(packet, name)
        # add.out(self, other, *, alpha, out) -> add.Tensor(self, other, *, alpha)
        if not written(other) and [(a.name, str(a.type)) for a in other._schema.arguments] == arguments:
            return other
    return None


class Writes:
    """Follows the calls of a graph that is being copied.

    A copied node stands for a tensor with its memory; `newest` is the node that holds what is in it by now. `emit` makes a call
    in the new graph: target, arguments, keyword arguments, value.
    """

    def __init__(self, emit: Callable[[Any, tuple[Any, ...], dict[str, Any], Value], fx.Node]) -> None:
        self.emit = emit
        self._parents: dict[fx.Node, fx.Node] = {}
        self._newest: dict[fx.Node, fx.Node] = {}
        self._lost: set[fx.Node] = set()

    def note(self, call: fx.Node, source: Any) -> None:
        """A call was copied whose first argument is `source`: it may be a view of that."""
        if isinstance(source, fx.Node) and _is_view(call):
            self._parents[call] = source

    def newest(self, node: fx.Node) -> fx.Node:
        """What a tensor holds at this point of the graph."""
        if node in self._lost:
            raise NoValue
        return self._newest.get(node, node)

    def write(self, target: Any, changed: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """`target`, an operator in place, is called on the tensor `changed` and `args`. Raises NoValue."""
        if not isinstance(changed, fx.Node):
            raise NoValue
        # `newest` refuses a tensor whose memory may have changed unseen.
        before = value(self.newest(changed))
        if changed.op == "placeholder":
            raise NoValue(changed)
        self.put(changed, self._result(target, self.newest(changed), args, kwargs, before))

    def put(self, changed: Any, new: fx.Node) -> None:
        """The tensor `changed` holds `new` from here on, and so do those that share its memory. Raises NoValue."""
        if not isinstance(changed, fx.Node):
            raise NoValue
        before, shared = value(self.newest(changed)), changed in self._parents or any(True for _ in self._views_of(changed))
        if value(new).dtype != before.dtype:
            new = self.emit(aten.to.dtype, (new, before.dtype), {}, Value(value(new).shape, before.dtype))
        if not _alike(value(new).shape, before.shape) and (shared or changed.op == "placeholder"):
            raise NoValue  # `out=` gives a tensor of another size new memory, which its views do not have
        self._newest[changed] = new
        # Upwards: each tensor that this is a view of gets the new numbers where the view lies.
        on_the_way = {changed}
        while changed in self._parents:
            parent = self._parents[changed]
            self._newest[parent] = self._put(changed, self.newest(parent), self._newest[changed])
            on_the_way.add(parent)
            changed = parent
        if changed.op == "placeholder":
            raise NoValue(changed)
        # Downwards: all other views of that memory are taken anew from what it holds now.
        for view in self._views_of(changed):
            if view in on_the_way:
                continue
            # A reshape may be a view or a copy. Nothing is wrong unless it is read again, so only `newest` refuses it.
            if _unclear(view) or self._parents[view] in self._lost:
                self._lost.add(view)
            else:
                source = self.newest(self._parents[view])
                self._newest[view] = self.emit(view.target, (source, *view.args[1:]), dict(view.kwargs), view.meta["value"])

    def _result(self, target: Any, old: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], before: Value) -> fx.Node:
        """What an operator in place leaves in its first argument."""
        # add_.Tensor -> add.Tensor
        packet = getattr(aten, str(without_overload(target).__name__).removesuffix("_"), None)
        pure = getattr(packet, target._overloadname, None) if packet is not None else None
        if pure is None:
            raise NoValue
        # `x.copy_(y)` holds y afterwards, cast and broadcast to x.
        if packet is not aten.copy or not isinstance(args[0], fx.Node):
            return self.emit(pure, (old, *args), kwargs, before)
        new = args[0]
        if value(new).dtype != before.dtype:
            new = self.emit(aten.to.dtype, (new, before.dtype), {}, Value(value(new).shape, before.dtype))
        if value(new).shape != before.shape:
            new = self.emit(aten.expand.default, (new, list(before.shape)), {}, before)
        return new

    def _put(self, view: fx.Node, parent: fx.Node, new: fx.Node) -> fx.Node:
        """What `parent` holds once `view`, a view of it, holds `new`."""
        packet = operator_of(view)
        if _unclear(view) or not has_one_result(parent):
            raise NoValue
        # The inverse of each kind of view: it puts `new` where the view took its numbers from.
        base, args = value(parent), view.args[1:]
        if packet in (aten.alias, aten.slice, aten.to) and value(view).shape == base.shape:
            return new
        if packet is aten.slice:
            return self.emit(aten.slice_scatter.default, (parent, new, *args), {}, base)
        if packet is aten.select:
            return self.emit(aten.select_scatter.default, (parent, new, *args), {}, base)
        if packet in (aten.view, aten.unsqueeze, aten.squeeze):
            return self.emit(aten.reshape.default, (new, list(base.shape)), {}, base)
        if packet is aten.transpose:
            return self.emit(aten.transpose.int, (new, *args), {}, base)
        if packet is aten.permute:
            rank = len(base.shape)
            order = [dim % rank for dim in args[0]]  # type: ignore[union-attr]
            return self.emit(aten.permute.default, (new, [order.index(dim) for dim in range(rank)]), {}, base)
        raise NoValue

    def _views_of(self, root: fx.Node) -> Iterator[fx.Node]:
        """All views of a tensor, and views of these, in the order of their making."""
        # Parents are noted before their views, so one pass over the views finds all of them.
        known = {root}
        for view, parent in self._parents.items():
            if parent in known:
                known.add(view)
                yield view


def _alike(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return len(a) == len(b) and all(same(m, n) for m, n in zip(a, b, strict=True))


def _is_view(call: fx.Node) -> bool:
    source = call.args[0]
    if is_item(call):
        return isinstance(source, fx.Node) and _may_alias(source)
    if not _may_alias(call):
        return False
    cast = operator_of(call) is aten.to and isinstance(source, fx.Node)  # type: ignore[union-attr]
    return not (cast and value(source).dtype != value(call).dtype)  # type: ignore[arg-type]


def _may_alias(call: fx.Node) -> bool:
    """Whether an operator gives its operand's memory: `split` does, `topk` makes new tensors."""
    schema = getattr(call.target, "_schema", None)
    return schema is not None and any(result.alias_info for result in schema.returns)


def _unclear(view: fx.Node) -> bool:
    return operator_of(view) in _UNCLEAR
