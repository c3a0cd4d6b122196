"""The self-check: a captured Program against the caller's model with its own attention, on random input."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from shardcomp.capture.copying import copy_model
from shardcomp.capture.fake_model import configs, experts_of_any_dtype
from shardcomp.errors import CaptureError
from shardcomp.ir import operators
from shardcomp.ir.interpreter import compute, evaluate
from shardcomp.ir.operators import is_aten, operator_of
from shardcomp.ir.precision import Widened
from shardcomp.ir.program import B, Degraded, Program, S
from shardcomp.kernels.cross_entropy import cross_entropy

LIMIT = 50_000_000
"""A capture checks itself for models up to this many parameters; a larger one is checked in its small version by `verify`."""

aten = torch.ops.aten
DROPOUTS = operators.of_family("dropout", fused=False)
"""Operators that change nothing where they draw nothing."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
_IGNORED = -100


def check_after_capture(program: Program, model: nn.Module) -> Degraded | None:
    """`self_check` where it is cheap and its answer is certain: not too many parameters, nothing drawn at random.

    Returns what stands in the way where the model itself does not run here; raises CaptureError where the Program does not
    compute what the model does.
    """
    if sum(p.numel() for p in model.parameters()) > LIMIT or _drops(program):
        return None
    try:
        deviation = self_check(program, model)
    except _ModelFailure as failure:
        return Degraded("self-check", f"the captured graph was not compared with the model, which fails on its own: {failure}")
    tolerance = _TOLERANCE[_dtype(program)]
    # `not <=`, because a NaN must fail as well.
    if not deviation <= tolerance:
        raise CaptureError(
            f"{program.name}{program.signature}: the captured graph is off from the model by {deviation:.1e} (relative, of "
            f"{tolerance:.0e} allowed): the model does something that its graph does not show"
        )
    return None


class _ModelFailure(CaptureError):
    """The caller's model does not run by itself in the dtype that was captured."""


def self_check(program: Program, model: nn.Module) -> float:
    """The largest deviation of an output from the caller's model, relative to the output's largest value.

    program: as captured or canonical. model: its tensors may be on meta; a copy with random weights is run, because an
    attention that is nearly uniform, as HuggingFace's initialisation leaves it, hides what is wrong with it. Raises
    CaptureError where the model does not run by itself.
    """
    dtype = _dtype(program)
    reference = _reference(model, dtype, program)
    batch = _random_input(program, reference)
    with torch.no_grad():
        with Widened() if dtype == torch.float64 else nullcontext():
            options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
            try:
                expected = reference(**batch, **options)
            except Exception as error:
                raise _ModelFailure(f"{program.name} in {dtype}: {error}") from error
        parameters = dict(reference.named_parameters())
        try:
            got = evaluate(program, batch | _label_count(program, batch), parameters)
        except Exception as error:
            raise CaptureError(f"{program.name}{program.signature}: the captured graph does not run: {error}") from error
    return max(_deviation(got[name], expected[name]) for name in program.signature.outputs)


def _dtype(program: Program) -> torch.dtype:
    return next(p.dtype for p in program.parameters.values() if p.dtype.is_floating_point)


def _drops(program: Program) -> bool:
    """Whether the Program draws random numbers."""
    return any(draws(node) for body in program.bodies() for node in body.calls())


def draws(node: fx.Node) -> bool:
    """Whether a call draws random numbers."""
    if not is_aten(node):
        return bool(node.kwargs.get("dropout"))
    packet = operator_of(node)
    # dropout(x, p, train) draws nothing in eval mode or for p = 0.
    if packet in DROPOUTS:
        return bool(node.args[1] and node.args[2])
    if packet is aten.scaled_dot_product_attention:
        return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p"))
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _reference(model: nn.Module, dtype: torch.dtype, program: Program) -> nn.Module:
    """A copy of the model on the CPU that computes in `dtype`: random parameters, the Program's buffers."""
    draw = torch.Generator().manual_seed(0)
    # `copy_model` puts these in the place of the model's tensors, which may be on meta.
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(_random_weight(parameter, dtype, draw), requires_grad=False)
    for name, buffer in model.named_buffers():
        known = program.buffers.get(name)
        memo[id(buffer)] = torch.zeros(buffer.shape, dtype=buffer.dtype) if known is None else known.value.clone()
    twin = copy_model(model, memo)
    if program.signature.training is not None:
        twin.train(program.signature.training)
    capped = any(node.kwargs.get("softcap") or node.kwargs.get("sinks") for body in program.bodies() for node in body.calls())
    for config in configs(twin):
        # Some versions drop a soft-cap silently under SDPA; there the eager attention is what the model means.
        if capped or config._attn_implementation not in ("sdpa", "eager"):
            config._attn_implementation = "eager" if capped else "sdpa"
    if dtype == torch.float64:
        experts_of_any_dtype(twin, "eager")
    return twin


def _random_weight(like: Tensor, dtype: torch.dtype, draw: torch.Generator) -> Tensor:
    """Matrices that double the size of what they are applied to, vectors around one; the numbers of a quantized weight:
    zero."""
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    if like.dim() < 2:
        return (0.5 + torch.rand(like.shape, generator=draw)).to(dtype)
    # A row of n numbers with deviation 2 / √n: a product with it doubles the size of x.
    return (2 * like.shape[-1] ** -0.5 * torch.randn(like.shape, generator=draw)).to(dtype)


def _random_input(program: Program, model: nn.Module) -> dict[str, Tensor]:
    """A batch with ignored labels, some padding on the right, and packed positions, of what the signature takes."""
    rows, length = program.static_shape or (2, 12)
    draw = torch.Generator().manual_seed(0)
    vocabulary = next(iter(model.get_input_embeddings().weight.shape)) if hasattr(model, "get_input_embeddings") else 2
    ids = torch.randint(0, vocabulary, (rows, length), generator=draw)
    batch = {
        "input_ids": ids,
        "labels": torch.where(torch.rand((rows, length), generator=draw) < 0.2, _IGNORED, ids),
        # Row i ends in i tokens of padding, after at least two real ones.
        "attention_mask": (torch.arange(length) < torch.arange(length, length - rows, -1).clamp(min=2).unsqueeze(1)).long(),
        # Positions start again after half a row: two packed sequences.
        "position_ids": (torch.arange(length) % max(2, length // 2 + 1)).expand(rows, -1).contiguous(),
    }
    return {name: batch.get(name, torch.zeros_like(ids)) for name, _ in program.signature.inputs}


def _label_count(program: Program, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """`num_items_in_batch` for a canonical Program: the labels that its cross entropy counts."""
    [unit] = program.units
    losses = [node for node in unit.body.calls() if node.target is cross_entropy]
    extra = [name for name in program.inputs if name not in batch]
    if not losses or not extra:
        return {}
    labels, ignored = losses[0].args[1:3]
    assert isinstance(labels, fx.Node)
    rows, length = next(iter(batch.values())).shape
    # The labels as the loss sees them, since the model may shift them.
    counted = compute([labels], batch, {B: rows, S: length})[labels] != ignored
    return {extra[0]: counted.sum()}


def _deviation(got: Tensor, expected: Tensor) -> float:
    # An output of zeros must not divide by zero.
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float(((got - expected).abs().max() / scale).double())
