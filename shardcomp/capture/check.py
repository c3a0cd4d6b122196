"""The self-check: a captured Program against the caller's model with its own attention, on random input."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
from torch import Tensor, fx, nn

from shardcomp.capture.evaluate import compute, evaluate
from shardcomp.capture.twin import buffer_dtype, configs, has_data
from shardcomp.errors import CaptureError
from shardcomp.kernels.cross_entropy import cross_entropy
from shardcomp.precision import Widened
from shardcomp.program import B, Program, S

LIMIT = 50_000_000
"""A capture checks itself for models up to this many parameters; a larger one is checked in its small version by `verify`."""

_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2}
_IGNORED = -100


def check_after_capture(program: Program, model: nn.Module) -> None:
    """`self_check` where it is cheap and its answer is certain: real weights on the CPU, not too many, no dropout.

    Raises CaptureError where the Program does not compute what the model does.
    """
    parameters = list(model.parameters())
    cheap = sum(p.numel() for p in parameters) <= LIMIT and all(has_data(p) and p.device.type == "cpu" for p in parameters)
    if not cheap or _drops(program):
        return
    deviation = self_check(program, model)
    tolerance = _TOLERANCE[_dtype(program)]
    if not deviation <= tolerance:
        raise CaptureError(
            f"{program.name}{program.signature}: the captured graph is off from the model by {deviation:.1e} (relative, of "
            f"{tolerance:.0e} allowed): the model does something that its graph does not show"
        )


def self_check(program: Program, model: nn.Module) -> float:
    """The largest deviation of an output from the caller's model, relative to the output's largest value.

    program: as captured or canonical. model: with its weights, at least on the CPU; it is copied, not touched. Raises
    CaptureError where it has no weights.
    """
    without = next((name for name, p in model.named_parameters() if not has_data(p)), None)
    if without is not None:
        raise CaptureError(f"{type(model).__name__} cannot be compared with its graph: {without} has no data")
    dtype = _dtype(program)
    reference = _reference(model, dtype, program)
    given = _random_input(program, reference)
    with torch.no_grad():
        with Widened() if dtype == torch.float64 else nullcontext():
            options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
            expected = reference(**given, **options)
        parameters = dict(reference.named_parameters())
        got = evaluate(program, given | _label_count(program, given), parameters)
    return max(_deviation(got[name], expected[name]) for name in program.signature.outputs)


def _dtype(program: Program) -> torch.dtype:
    return next(p.dtype for p in program.parameters.values() if p.dtype.is_floating_point)


def _drops(program: Program) -> bool:
    """Whether the Program draws random numbers."""
    if not program.signature.training:
        return False
    return any(
        node.kwargs.get("dropout", 0.0) or "dropout" in str(node.target) and node.args[1]
        for body in program.bodies()
        for node in body.calls()
    )


def _reference(model: nn.Module, dtype: torch.dtype, program: Program) -> nn.Module:
    """A copy of the model on the CPU that computes in `dtype`, floating buffers as the Program holds them."""
    twin = copy.deepcopy(model).cpu().train(program.signature.training)
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for module in twin.modules():
        for name, held in module.named_buffers(recurse=False):
            if held.is_floating_point():
                module._buffers[name] = held.to(buffer_dtype(dtype))
    capped = any(node.kwargs.get("softcap") or node.kwargs.get("sinks") for body in program.bodies() for node in body.calls())
    for config in configs(twin):
        # Some versions drop a soft-cap silently under SDPA; there the eager attention is what the model means.
        if capped or config._attn_implementation not in ("sdpa", "eager"):
            config._attn_implementation = "eager" if capped else "sdpa"
    return twin


def _random_input(program: Program, model: nn.Module) -> dict[str, Tensor]:
    """A batch with ignored labels, some padding on the right, and packed positions, of what the signature takes."""
    rows, length = program.static_shape or (2, 12)
    draw = torch.Generator().manual_seed(0)
    vocabulary = next(iter(model.get_input_embeddings().weight.shape)) if hasattr(model, "get_input_embeddings") else 2
    ids = torch.randint(0, vocabulary, (rows, length), generator=draw)
    made = {
        "input_ids": ids,
        "labels": torch.where(torch.rand((rows, length), generator=draw) < 0.2, _IGNORED, ids),
        "attention_mask": (torch.arange(length) < torch.arange(length, length - rows, -1).clamp(min=2).unsqueeze(1)).long(),
        "position_ids": (torch.arange(length) % max(2, length // 2 + 1)).expand(rows, -1).contiguous(),
    }
    return {name: made.get(name, torch.zeros_like(ids)) for name, _ in program.signature.inputs}


def _label_count(program: Program, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """`num_items_in_batch` for a canonical Program: the labels that its cross entropy counts."""
    [unit] = program.units
    losses = [node for node in unit.body.calls() if node.target is cross_entropy]
    extra = [name for name in program.inputs if name not in given]
    if not losses or not extra:
        return {}
    labels, ignored = losses[0].args[1:3]
    assert isinstance(labels, fx.Node)
    rows, length = next(iter(given.values())).shape
    counted = compute([labels], given, {B: rows, S: length})[labels] != ignored
    return {extra[0]: counted.sum()}


def _deviation(got: Tensor, expected: Tensor) -> float:
    scale = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return float(((got - expected).abs().max() / scale).double())
