"""Bring the captured graph to a canonical form that later passes can read without knowing where it came from.

Needs: a captured Program of one unit. Afterwards a call's target is an ATen operator or a kernel, sizes are numbers or expressions
in b and s, every view is a reshape with its sizes written out, nothing names a device, and what computes nothing is gone: asserts,
aliases, casts to the same dtype, slices of everything, dropout that drops nothing. A loss that is a mean becomes a sum over tokens
divided by `num_items_in_batch`, a new input, so that the same program serves any share of a batch.

Legality: what is dropped is the identity on values and gradients. A mean over n labels is their sum divided by n. Segments and key
masks that no input of the caller reaches and that are the same for every token mask nothing.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from shardcomp.errors import CaptureError, PlanError
from shardcomp.kernels.attention import attention
from shardcomp.kernels.cross_entropy import cross_entropy
from shardcomp.program import INPUT, B, Body, Context, Contract, Program, S, Value, tensor_arguments, value

CONTRACT = Contract(provides=frozenset({"canonical"}))
COUNT = "num_items_in_batch"
aten = torch.ops.aten

_IDENTITIES = {aten.contiguous, aten.alias, aten.lift_fresh, aten.lift_fresh_copy, aten.lift, aten._to_copy}
_VIEWS = {aten.view, aten._unsafe_view, aten.reshape, aten.flatten, aten.unflatten, aten.view_as, aten.reshape_as, aten.ravel}
_EXPANDS = {aten.expand, aten.expand_as, aten.broadcast_to}
_CASTS = {aten.to, aten.type_as, aten._to_copy}
_PLACES = ("device", "layout", "pin_memory", "memory_format", "non_blocking")
_PROBES = ((1, 3), (2, 8), (3, 33))
"""Sizes (b, s) at which a mask that depends on sizes alone is looked at."""


def run(program: Program, context: Context) -> Program:
    [unit] = program.units
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    results = graph.graph_copy(unit.body.graph, copied)
    for old, new in copied.items():
        new.meta = dict(old.meta)
    graph.output(results)
    body = Body(unit.body.name, graph)
    for node in list(body.calls()):
        _simplify(node)
    _stop_gradients(body)
    _refuse_dropout(body)
    inputs = dict(program.inputs)
    if "loss" in program.outputs:
        inputs[COUNT] = _divide_by_count(body, list(program.outputs).index("loss"))
    _drop_idle_masks(body)
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.meta["role"] != INPUT and not node.users:
            graph.erase_node(node)
    _propagate_gradients(body)
    roles = {role: tuple(n.meta["path"] for n in body.placeholders(role)) for role in ("input", "parameter", "buffer")}
    changed = replace(unit, body=body, inputs=roles["input"], parameters=roles["parameter"], buffers=roles["buffer"])
    values = {**program.values, **inputs}
    values.update(zip(program.outputs.values(), (value(node) for node in body.results), strict=True))
    return replace(program, units=[changed], inputs=inputs, values=values)


def _replace(node: fx.Node, other: fx.Node) -> None:
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)


def _simplify(node: fx.Node) -> None:
    """Rewrite one call in its canonical form, or drop it."""
    packet = getattr(node.target, "overloadpacket", node.target)
    if packet is torch.ops.shardcomp.attention:
        _attention(node)
        return
    if packet is operator.getitem:
        return
    held = node.meta["value"]
    node.kwargs = {key: argument for key, argument in node.kwargs.items() if key not in _PLACES}
    first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
    if isinstance(held, Value) and first is not None and isinstance(first.meta["value"], Value):
        before = value(first)
        if packet in _CASTS and before.dtype != held.dtype:
            node.target, node.args, node.kwargs = aten.to.dtype, (first, held.dtype), {}
            return
        if packet in _CASTS or packet in _IDENTITIES:
            _replace(node, first)
            return
        if packet in _VIEWS | _EXPANDS:
            if before.shape == held.shape:
                _replace(node, first)
                return
            node.target = aten.expand.default if packet in _EXPANDS else aten.reshape.default
            node.args, node.kwargs = (first, list(held.shape)), {}
            return
        if packet is aten.slice and before.shape == held.shape:
            _replace(node, first)
            return
        if packet in (aten.dropout, aten.feature_dropout, aten.alpha_dropout) and (node.args[1] == 0 or not node.args[2]):
            _replace(node, first)


def _attention(node: fx.Node) -> None:
    """The recorded operator as a call of the kernel, with only the options that say something."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    given = dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
    tensors = tuple(given.pop(name) for name in ("q", "k", "v"))
    options = {key: held for key, held in given.items() if held is not None and not (key == "dropout" and held == 0)}
    node.target, node.args, node.kwargs = attention, tensors, options


def _stop_gradients(body: Body) -> None:
    """Where a region without gradient reads something that has one, cut it off; everywhere else such a region changes nothing."""
    for node in list(body.calls()):
        if not node.meta.pop("no_gradient", False):
            continue
        for operand in dict.fromkeys(tensor_arguments(node)):
            held = operand.meta["value"]
            if isinstance(held, Value) and held.requires_grad:
                with body.graph.inserting_before(node):
                    cut = body.graph.call_function(aten.detach.default, (operand,))
                cut.meta = {"path": node.meta["path"], "value": replace(held, requires_grad=False)}
                node.replace_input_with(operand, cut)


def _refuse_dropout(body: Body) -> None:
    for node in body.calls():
        packet = getattr(node.target, "overloadpacket", node.target)
        rate = node.kwargs.get("dropout", 0) if packet is attention else node.args[1] if packet is aten.dropout else 0
        if rate:
            where = node.meta["path"] or "the model"
            raise PlanError(
                f"{where} drops values at the rate {rate} in training, and random masks over ranks are not supported: "
                "set the dropout rates of the configuration (attention_dropout, resid_pdrop and the like) to 0, or call eval()"
            )


def _divide_by_count(body: Body, position: int) -> Value:
    """Turn the mean cross entropy behind the loss into a sum divided by a new input; returns what is known of that input."""
    packets = {node: getattr(node.target, "overloadpacket", None) for node in body.calls()}
    losses = [node for node, packet in packets.items() if packet in (aten.cross_entropy_loss, aten.nll_loss, aten.nll_loss_nd)]
    if len(losses) != 1 or packets[losses[0]] is not aten.cross_entropy_loss:
        raise CaptureError(f"the loss is made of {len(losses)} cross entropies, where exactly one can be counted per token")
    [node] = losses
    if node not in _ancestors(body.results[position]):
        raise CaptureError("the loss does not come from the model's cross entropy, so it has no tokens to be a mean over")
    given = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=False)) | dict(node.kwargs)  # type: ignore[union-attr]
    if given.get("weight") is not None or given.get("label_smoothing", 0) or given.get("reduction", 1) != 1:
        raise CaptureError("the loss is not a plain mean: class weights, label smoothing and other reductions have no rule")
    logits, labels = node.args[0], node.args[1]
    known = value(logits)  # type: ignore[arg-type]
    count = Value((), torch.int64)
    inputs = body.placeholders(INPUT)
    with body.graph.inserting_after(inputs[-1]):
        total_count = body.graph.placeholder(COUNT)
    total_count.meta = {"role": INPUT, "path": COUNT, "value": count}
    path = node.meta["path"]
    with body.graph.inserting_before(node):
        each = body.graph.call_function(cross_entropy, (logits, labels, given.get("ignore_index", -100)))
        each.meta = {"path": path, "value": Value(known.shape[:1], known.dtype, known.requires_grad)}
        total = body.graph.call_function(aten.sum.default, (each,))
        total.meta = {"path": path, "value": Value((), known.dtype, known.requires_grad)}
        mean = body.graph.call_function(aten.div.Tensor, (total, total_count))
        mean.meta = {"path": path, "value": Value((), known.dtype, known.requires_grad)}
    _replace(node, mean)
    return count


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        at = pending.pop()
        if at not in found:
            found.add(at)
            pending += tensor_arguments(at)
    return found


def _drop_idle_masks(body: Body) -> None:
    """Segments that no input reaches and that are one segment for every length: positions that the model counted up itself."""
    known: dict[fx.Node, bool] = {}
    for node in body.calls():
        if node.target is not attention:
            continue
        kept = dict(node.kwargs)
        for names in (("q_segment", "k_segment"), ("key_mask",)):
            held = kept.get(names[0])
            if not isinstance(held, fx.Node):
                continue
            if held not in known:
                known[held] = _is_idle(held, want_true=names == ("key_mask",))
            if known[held]:
                for name in names:
                    kept.pop(name, None)
        node.kwargs = kept


def _is_idle(node: fx.Node, want_true: bool) -> bool:
    """Whether a mask that depends on sizes alone is the same for every token (and true, for one of keys)."""
    needed = _ancestors(node)
    if any(n.op == "placeholder" for n in needed):
        return False
    for b, s in _PROBES:
        found = _evaluate([n for n in node.graph.nodes if n in needed], {B: b, S: s})[node]
        if not bool((found == found[..., :1]).all()) or (want_true and not bool(found.all())):
            return False
    return True


def _evaluate(nodes: list[fx.Node], sizes: dict[sympy.Symbol, int]) -> dict[fx.Node, Any]:
    found: dict[fx.Node, Any] = {}

    def concrete(argument: Any) -> Any:
        return int(argument.subs(sizes)) if isinstance(argument, sympy.Expr) else argument

    for node in nodes:
        args = fx.node.map_aggregate(fx.map_arg(node.args, lambda n: found[n]), concrete)
        kwargs = fx.node.map_aggregate(fx.map_arg(dict(node.kwargs), lambda n: found[n]), concrete)
        found[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return found


def _propagate_gradients(body: Body) -> None:
    """A floating result of something that has a gradient has one, up to where it is cut off."""
    for node in body.calls():
        held = node.meta["value"]
        graded = any(_any_gradient(a) for a in tensor_arguments(node)) and node.target is not aten.detach.default
        each = tuple(replace(v, requires_grad=graded and v.floating) for v in ([held] if isinstance(held, Value) else held))
        node.meta["value"] = each[0] if isinstance(held, Value) else each


def _any_gradient(node: fx.Node) -> bool:
    held = node.meta["value"]
    return any(v.requires_grad for v in ([held] if isinstance(held, Value) else held))

