"""Bring the captured graph into one form, so that every later pass meets one way of writing each thing.

Afterwards
- calls are ATen operators without a device, `getitem`, `attention` and `cross_entropy`;
- a product with a matrix of weights is a `linear`; a product of matrices has no scale and no summand;
- a change of shape is a `reshape` with every size given, a cast is `to.dtype`, an `expand` names every size;
- identities are gone: copies, aliases, full slices, casts to the same dtype, dropout that drops nothing, dead code;
- a dropout names the random stream that it draws from, the shared one; nothing else draws random numbers;
- what was computed under no_grad needs no gradient; a `detach` stands where such a region reads something that does;
- segments and key masks that no input decides, and that let every query see everything, are gone;
- the loss is a sum divided by `num_items_in_batch`, a new input;
- `attention` names the provider that runs it, where the policy chooses one.

Legality: each replacement computes the same numbers. The mean over labels that count is their sum divided by how many there
are. A batch is spread over ranks and micro-batches, so only the caller knows that number.

    view(x, [-1, v]) -> cross_entropy_loss        reshape(x, [b·s, v]) -> cross_entropy -> sum -> div(num_items_in_batch)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from shardcomp.capture.check import DROPOUTS, draws
from shardcomp.capture.flatten import mark_gradients
from shardcomp.errors import CaptureError, PlanError, raise_all
from shardcomp.ir import operators
from shardcomp.ir.interpreter import compute
from shardcomp.ir.nodes import (
    ancestors,
    has_one_result,
    is_buffer,
    is_parameter,
    is_under_no_grad,
    path_of,
    role_of,
    source_of,
    value,
)
from shardcomp.ir.operators import operator_name, operator_of
from shardcomp.ir.program import BUFFER, INPUT, PARAMETER, B, Body, Context, Contract, Program, S, Value
from shardcomp.kernels.attention import attention
from shardcomp.kernels.cross_entropy import cross_entropy
from shardcomp.kernels.dropout import SHARED, dropout, dropped_attention

CONTRACT = Contract(provides=frozenset({"canonical"}))

COUNT = "num_items_in_batch"
"""The input that the loss is divided by: int64, shape (), the labels that count in the global batch."""

aten = torch.ops.aten

_COPIES = operators.becoming("operand")
_CASTS = operators.becoming("to")
_SHAPES = operators.becoming("reshape")
_EXPANSIONS = operators.becoming("expand")
_PRODUCTS = operators.becoming("linear")
_DROPPING = {aten.dropout: dropout, aten.scaled_dot_product_attention: dropped_attention}
_SDPA = aten.scaled_dot_product_attention.default
# Arguments that say where and how a tensor is stored, not what it contains.
_PLACES = ("device", "layout", "pin_memory", "non_blocking", "memory_format")
# What torch.export writes for the end of `x[a:]`.
_TO_THE_END = 2**63 - 1
_TRIED = ((2, 17), (1, 2**20))
"""The (b, s) at which a mask that depends only on sizes is evaluated, the longest longer than any model's chunks."""


def run(program: Program, context: Context) -> Program:
    [unit] = program.units
    raise_all(PlanError, program.name, _random_numbers(program))
    body = _Rewriting(unit.body).body
    _drop_idle_masks(body, program)
    inputs = dict(program.inputs)
    if "loss" in program.outputs:
        _count_labels(body, program)
        inputs[COUNT] = Value((), torch.int64)
    # Now, because both steps above leave calls that nothing reads.
    _drop_dead(body)
    _name_provider(body, program, context.policy.options.attention)
    # Calls that were made here do not say yet whether a gradient flows into them.
    mark_gradients(body, program.parameters)
    outputs = {name: value(node) for name, node in zip(unit.outputs, body.results, strict=True)}
    # Persistent buffers are saved with the model, so they stay even where this call reads none of them.
    used = tuple(path_of(node) for node in body.placeholders(BUFFER))
    return replace(
        program,
        units=[replace(unit, body=body, inputs=tuple(inputs), buffers=used)],
        inputs=inputs,
        values={**program.values, **inputs, **outputs},
        buffers={name: buffer for name, buffer in program.buffers.items() if buffer.persistent or name in used},
    )


def _random_numbers(program: Program) -> Iterator[str]:
    """Operators that draw random numbers and are no dropout, with the modules that they are called in."""
    [unit] = program.units
    modules_of: dict[str, set[str]] = {}
    for node in unit.body.calls():
        # Dropout draws from the streams of `runtime.random`, so that ranks agree and a recompute repeats it. Other operators
        # draw from torch's generator and could do neither.
        if draws(node) and node.target is not attention and operator_of(node) not in _DROPPING:
            modules_of.setdefault(operator_name(node), set()).add(path_of(node) or "the model")
    for operator, modules in modules_of.items():
        shown = ", ".join(sorted(modules)[:3]) + (f" and {len(modules) - 3} more modules" if len(modules) > 3 else "")
        yield f"{operator}, called in {shown}, draws random numbers, as nothing but dropout can: take it out of the model"


class _Rewriting:
    """Copies a graph call by call, each in its canonical form."""

    def __init__(self, old: Body) -> None:
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, Any] = {}
        self.detached: dict[fx.Node, fx.Node] = {}
        needed = ancestors(old.results)
        for node in old.graph.nodes:
            # All placeholders stay here. `_drop_dead` removes unread buffers; unread parameters are still saved.
            if node.op == "placeholder":
                self.copies[node] = self.graph.node_copy(node)
                self.copies[node].meta = dict(node.meta)
            elif node.op == "call_function" and node in needed:
                self.copies[node] = self._rewrite(node)
        self.graph.output(tuple(self.copies[node] for node in old.results))
        self.body = Body(old.name, self.graph)

    def _rewrite(self, node: fx.Node) -> fx.Node:
        frozen = is_under_no_grad(node)
        args = fx.map_arg(node.args, lambda argument: self._read(argument, frozen, node))
        kwargs = fx.map_arg(dict(node.kwargs), lambda argument: self._read(argument, frozen, node))
        kwargs = {key: option for key, option in kwargs.items() if key not in _PLACES}
        target: Any = node.target
        packet = operator_of(node)
        source = args[0] if args and isinstance(args[0], fx.Node) else None
        if source is not None and has_one_result(source) and has_one_result(node):
            before, after = value(source), value(node)
            unchanged = before.shape == after.shape and before.dtype == after.dtype
            drops = draws(node)
            # An identity, such as a dropout in eval mode or with p = 0: its readers read its operand.
            if packet in _COPIES or (packet in DROPOUTS and not drops) or unchanged and _keeps(packet, args, after):
                return source
            if packet is aten.detach and not before.requires_grad:
                return source
            if drops:
                # Our dropout(x, p) has no flag `train`: this one is known to drop. `tensor_parallel` may choose another stream.
                target, kwargs = _DROPPING.get(packet, target), {**kwargs, "random": SHARED}
                args = args[:2] if target is dropout else args
            elif packet in _PRODUCTS and (product := self._product(args, kwargs, node)) is not None:
                return product
            elif packet in _CASTS:
                target, args, kwargs = aten.to.dtype, (source, after.dtype), {}
            # `view(dtype)` reinterprets bytes and has the same packet: that one is no reshape.
            elif packet in _SHAPES and before.dtype == after.dtype:
                target, args, kwargs = aten.reshape.default, (source, list(after.shape)), {}
            elif packet is aten.numpy_T and len(after.shape) == 2:
                target = aten.t.default
            elif packet in _EXPANSIONS:
                target, args, kwargs = aten.expand.default, (source, list(after.shape)), {}
            elif packet is aten.slice and len(args) == 4 and args[3] == _TO_THE_END:
                args = args[:3]
        # A tensor made of nothing, as by `ones`, would take torch's default dtype of the time when it runs.
        elif source is None and has_one_result(node) and value(node).floating and _takes_dtype(target):
            kwargs = {**kwargs, "dtype": value(node).dtype}
        return self._call(target, args, kwargs, node.meta["value"], node)

    def _product(self, args: Any, kwargs: dict[str, Any], node: fx.Node) -> fx.Node | None:
        """Rows by a matrix of weights, a bias added, as `linear`; a sum with scaled products in steps."""
        if operator_of(node) is aten.baddbmm:
            return self._scaled_sum(args, kwargs, node)
        bias, rows, matrix = args if operator_of(node) is aten.addmm else (None, *args)
        # A weight, or a transposed matrix, makes a `linear`. Other products stay, as in attention that a model computes itself.
        if kwargs or not (_is_weight(matrix) or _is_transposed(matrix)) or bias is not None and len(value(bias).shape) != 1:
            return None
        weight = value(matrix)
        if len(weight.shape) != 2:
            return None
        if _is_transposed(matrix):
            turned = matrix.args[0]
        else:
            # GPT-2's Conv1D stores its weight as [in, out].
            turned = self._call(aten.t.default, (matrix,), {}, replace(weight, shape=weight.shape[::-1]), node)
        return self._call(
            aten.linear.default, (rows, turned) if bias is None else (rows, turned, bias), {}, node.meta["value"], node
        )

    def _scaled_sum(self, args: Any, kwargs: dict[str, Any], node: fx.Node) -> fx.Node | None:
        """beta · added + alpha · left @ right in steps. alpha scales `left`, the smaller, before sums can overflow."""
        added, left, right = args
        beta, alpha = kwargs.get("beta", 1), kwargs.get("alpha", 1)
        # With beta = 0, `added` has a gradient of zeros. Without this call it would have none.
        if beta == 0 and value(added).requires_grad:
            return None
        if alpha != 1:
            # BLOOM computes its scores like this: added is alibi, and alpha is 1 / sqrt(d).
            left = self._call(aten.mul.Tensor, (left, alpha), {}, left.meta["value"], node)
        product = self._call(aten.bmm.default, (left, right), {}, node.meta["value"], node)
        if beta == 0:
            return product
        if beta != 1:
            added = self._call(aten.mul.Tensor, (added, beta), {}, added.meta["value"], node)
        return self._call(aten.add.Tensor, (added, product), {}, node.meta["value"], node)

    def _read(self, argument: fx.Node, frozen: bool, reader: fx.Node) -> fx.Node:
        """The copy of an argument; inside no_grad, detached from its gradient."""
        copy = self.copies[argument]
        known = copy.meta["value"]
        if not frozen or not isinstance(known, Value) or not known.requires_grad:
            return copy
        if copy not in self.detached:
            self.detached[copy] = self._call(aten.detach.default, (copy,), {}, replace(known, requires_grad=False), reader)
        return self.detached[copy]

    def _call(self, target: Any, args: Any, kwargs: dict[str, Any], known: Any, origin: fx.Node) -> fx.Node:
        call = self.graph.call_function(target, args, kwargs)
        call.meta = {"value": known, "path": path_of(origin), "source": source_of(origin)}
        return call


def _is_transposed(matrix: Any) -> bool:
    """Whether an operand is a transposed matrix, so that a product with it is `linear`."""
    return isinstance(matrix, fx.Node) and matrix.target is aten.t.default and len(value(matrix).shape) == 2


def _is_weight(matrix: Any) -> bool:
    """Whether a matrix is a parameter, maybe transposed or detached from its gradient."""
    while isinstance(matrix, fx.Node) and matrix.target in (aten.t.default, aten.detach.default):
        matrix = matrix.args[0]
    return is_parameter(matrix)


def _keeps(packet: Any, args: Any, after: Value) -> bool:
    """Whether a call whose result has its operand's shape and dtype gives just that operand."""
    if packet in _CASTS or packet in _SHAPES or packet in _EXPANSIONS:
        return True
    if packet is aten.slice:
        return len(args) < 5 or args[4] == 1
    if packet is aten.mul:
        return type(args[1]) in (int, float) and args[1] == 1
    # Only for integers: -0.0 + 0 is 0.0.
    return packet in (aten.add, aten.sub) and type(args[1]) is int and args[1] == 0 and not after.floating


def _takes_dtype(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and any(argument.name == "dtype" for argument in schema.arguments)


def _drop_idle_masks(body: Body, program: Program) -> None:
    """Remove the segments and key masks of attention that hide nothing, whatever the caller gives."""
    idle: dict[fx.Node, bool] = {}
    for node in body.calls():
        if node.target is not attention:
            continue
        # Both segments go together: attention with one of them alone would mean something else.
        for names in (("q_segment", "k_segment"), ("key_mask",)):
            masks = [node.kwargs[name] for name in names if isinstance(node.kwargs.get(name), fx.Node)]
            for mask in masks:
                if mask not in idle:
                    idle[mask] = _is_idle(mask, program)
            if masks and all(idle[mask] for mask in masks):
                node.kwargs = {key: argument for key, argument in node.kwargs.items() if key not in names}


def _name_provider(body: Body, program: Program, provider: str) -> None:
    """Have every attention run by what the policy names."""
    if provider == "auto":
        return
    calls = [node for node in body.calls() if node.target is attention]
    own = next((node for node in body.calls() if node.target in (dropped_attention, _SDPA)), None)
    # `attention` runs on SDPA unless it is told otherwise, and a model's own call of SDPA is one already.
    if provider == "sdpa" and (calls or own is not None):
        return
    if own is not None or not calls:
        where = "" if own is None else f", such as {own.meta['path']}"
        raise PlanError(
            f"{program.name}: attention = {provider}, but the model computes its attention itself{where}: use attention = auto"
        )
    for node in calls:
        node.kwargs = {**node.kwargs, "provider": provider}


def _is_idle(mask: fx.Node, program: Program) -> bool:
    """Whether a [b, s] mask is computed only from sizes and is constant along s; a bool one must be true as well."""
    roles = {role_of(node) for node in ancestors([mask]) if node.op == "placeholder"}
    # Another batch may hide something.
    if roles & {INPUT, PARAMETER}:
        return False
    buffers = {name: buffer.value for name, buffer in program.buffers.items()}
    for rows, length in (program.static_shape,) if program.static_shape else _TRIED:
        numbers = compute([mask], buffers, {B: rows, S: length})[mask]
        # A segment that is constant along s puts all tokens of a row into one segment.
        if not bool((numbers == (True if numbers.dtype == torch.bool else numbers[:, :1])).all()):
            return False
    return True


def _count_labels(body: Body, program: Program) -> None:
    """Replace the mean of a cross entropy by its sum over the labels that count, divided by the number given."""
    loss = _mean_loss(body, program)
    logits, labels, ignored = _cross_entropy_arguments(loss, program)
    result = value(loss)
    # The last of the inputs, because `run` adds it at the end of `Program.inputs`.
    with body.graph.inserting_after(body.placeholders(INPUT)[-1]):
        count = body.graph.placeholder(COUNT)
        count.meta = {"role": INPUT, "path": COUNT, "value": Value((), torch.int64)}
    with body.graph.inserting_before(loss):
        losses = body.graph.call_function(cross_entropy, (logits, labels, ignored))
        total = body.graph.call_function(aten.sum.default, (losses,))
        mean = body.graph.call_function(aten.div.Tensor, (total, count))
        shapes = [(losses, value(labels).shape), (total, ()), (mean, ())]
        # The sum over a whole batch does not fit a narrow dtype; the loss has the model's dtype again in the end.
        wide = torch.promote_types(result.dtype, torch.float32)
        if wide != result.dtype:
            mean = body.graph.call_function(aten.to.dtype, (mean, result.dtype))
    for node, shape in shapes:
        node.meta = {**loss.meta, "value": Value(shape, wide)}
    mean.meta = {**loss.meta, "value": Value((), result.dtype)}
    loss.replace_all_uses_with(mean)


def _mean_loss(body: Body, program: Program) -> fx.Node:
    """The one cross entropy that the loss is."""
    result = body.results[list(program.outputs).index("loss")]
    losses = [node for node in ancestors([result]) if operator_of(node) is aten.cross_entropy_loss]
    if len(losses) != 1:
        raise CaptureError(f"{program.name}: {len(losses)} cross entropies feed the loss; exactly one can be spread over ranks")
    loss = result
    # A cast of the loss is harmless. Anything else, such as an added balancing loss of experts, is refused below.
    while loss.target is aten.to.dtype:
        loss = loss.args[0]  # type: ignore[assignment]
    if loss is not losses[0]:
        raise CaptureError(
            f"{program.name}, {loss.meta['source']}: the loss is not the mean of a cross entropy but is made of one by "
            f"{loss.target}; turn off what the model adds to it, or take the logits and compute the loss outside"
        )
    return loss


def _cross_entropy_arguments(loss: fx.Node, program: Program) -> tuple[fx.Node, fx.Node, int]:
    """Logits [t, v], labels [t] and the label that does not count."""
    names = [argument.name for argument in loss.target._schema.arguments]  # type: ignore[union-attr]
    # torch's defaults; reduction = 1 is the mean.
    plain = {"weight": None, "reduction": 1, "ignore_index": -100, "label_smoothing": 0.0}
    arguments = {**plain, **dict(zip(names, loss.args, strict=False)), **loss.kwargs}
    odd = [f"{key} = {arguments[key]}" for key in ("weight", "reduction", "label_smoothing") if arguments[key] != plain[key]]
    if len(value(arguments["self"]).shape) != 2:
        odd.append(f"logits of shape {value(arguments['self']).shape}")
    if odd:
        where = f"{program.name}, {loss.meta['source']}"
        raise CaptureError(f"{where}: only the plain mean of a cross entropy over [t, v] can be split; here {', '.join(odd)}")
    return arguments["self"], arguments["target"], arguments["ignore_index"]


def _drop_dead(body: Body) -> None:
    needed = ancestors(body.results)
    # Readers before what they read: a node with users cannot be erased.
    for node in reversed(list(body.graph.nodes)):
        unread_buffer = is_buffer(node)
        if (node.op == "call_function" or unread_buffer) and node not in needed:
            body.graph.erase_node(node)
