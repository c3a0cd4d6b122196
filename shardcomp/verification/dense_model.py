"""The dense side of a comparison: the unmodified model on the whole batch, in one process, and the batches themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from shardcomp.capture.copying import copy_model
from shardcomp.capture.export import explain
from shardcomp.capture.fake_model import configs, experts_of_any_dtype
from shardcomp.errors import VerifyError
from shardcomp.ir.precision import COMPUTE, Widened
from shardcomp.runtime.loss_scale import LossScale
from shardcomp.torch_private import DropoutNd

Batch = dict[str, Tensor]
IGNORED = -100
KINDS = ("causal", "padded", "packed")
"""The kinds of batches: without further inputs, with an attention mask, and with positions that restart within a row."""


@dataclass
class RankCopy:
    """One version of a value that several ranks have.

    ranks: those that have these bits. stage: of the rank, where two stages of one rank have different versions; else None.
    """

    ranks: list[int]
    stage: int | None
    tensor: Tensor


@dataclass
class DifferingCopies:
    """A value that ranks should have the same bits of, and do not.

    quantity: loss, gradients or weights. parameter: its name, "" for a loss. kind: of the batch, "" for weights. copies: its
    different versions, at least two; the first is rank 0's, or that of the lowest rank that has the value.
    """

    quantity: str
    parameter: str
    kind: str
    copies: list[RankCopy]


@dataclass
class Outcome:
    """What one run of a plan, or of the dense model, computed."""

    loss: dict[str, Tensor] = field(default_factory=dict)
    """By kind of batch."""
    gradients: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By kind of batch and parameter name."""
    norm: dict[str, Tensor] = field(default_factory=dict)
    """Of all gradients together, by kind of batch."""
    logits: Tensor | None = None
    """Of the causal batch, `[rows, length, vocabulary]`."""
    own_gradients: dict[str, Tensor] = field(default_factory=dict)
    """The gradients of the model's loss plus `own_loss`, of the causal batch, by parameter name."""
    weights: dict[str, Tensor] = field(default_factory=dict)
    """After the optimizer steps, by parameter name."""
    disagreements: list[DifferingCopies] = field(default_factory=list)
    """The values that ranks of a plan do not agree about. The fields above have their first copies."""


OWN_LOSS = "causal + own loss"
"""What stands for the kind of batch where a gradient is of `own_loss` too."""
OWN_LOSS_PRECISIONS = ("fp64", "fp32")
"""The precisions in which the gradients of `own_loss` are compared."""
OPTIMIZER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
STEPS = 3


def batches(vocabulary: int, rows: int, length: int, seed: int) -> dict[str, Batch]:
    """Draw a batch of each kind: causal, padded (on the left and on the right), packed.

    The rows are distinct, and have different shares of ignored labels: so a mean of per-row means is not the mean.

    Args:
        vocabulary: how many tokens there are.
        rows, length: the shape of every tensor, `int64[rows, length]`.
        seed: of the generator that draws.

    Example:
        >>> {kind: sorted(batch) for kind, batch in batches(97, 2, 8, seed=0).items()}["packed"]
        ['input_ids', 'labels', 'position_ids']
    """
    draw = torch.Generator().manual_seed(seed)

    def base() -> Batch:
        ids = torch.randint(0, vocabulary, (rows, length), generator=draw)
        share = torch.linspace(0.05, 0.6, rows).unsqueeze(1)
        labels = torch.where(torch.rand((rows, length), generator=draw) < share, IGNORED, ids)
        return {"input_ids": ids, "labels": labels}

    padded, packed = base(), base()
    mask = torch.ones((rows, length), dtype=torch.long)
    positions = torch.zeros((rows, length), dtype=torch.long)
    for row in range(rows):
        padding = 1 + (row * 3) % (length // 2)
        mask[row, slice(0, padding) if row % 2 else slice(length - padding, length)] = 0
        first_document = 1 + (row * 5) % (length - 2)
        positions[row] = torch.cat([torch.arange(first_document), torch.arange(length - first_document)])
    padded["attention_mask"] = mask
    # Padding predicts nothing that counts. A token of padding on the left sees no key, and attention to no key is undefined.
    padded["labels"] = torch.where((mask == 0) | (mask.roll(1, 1) == 0), IGNORED, padded["labels"])
    packed["position_ids"] = positions
    return dict(zip(KINDS, (base(), padded, packed), strict=True))


def own_loss(logits: Tensor) -> Tensor:
    """A loss as users compute it from whole logits: a z-loss, summed over samples."""
    return 1e-3 * torch.logsumexp(logits, -1).square().sum()


def update_batches(vocabulary: int, rows: int, length: int, seed: int) -> list[Batch]:
    """The batches of the optimizer steps."""
    return [batches(vocabulary, rows, length, seed + 1 + step)["causal"] for step in range(STEPS)]


def dense(model: nn.Module, precision: str, batches_by_kind: Mapping[str, Batch], updates: list[Batch]) -> Outcome:
    """Run the unmodified model in this process.

    Args:
        model: with real weights. It is copied.
        precision: fp64 widens every cast of the model's code. bf16 and fp16 compute in 16 bits. fp16 has the largest loss scale
            whose gradients are finite.
        batches_by_kind: the batches of forward and backward; "causal" is among them.
        updates: the batches of optimizer steps, which come last.

    Raises:
        VerifyError: the model fails by itself.
    """
    reference = in_dtype(model, COMPUTE[precision]).train()
    try:
        return _run(reference, precision, batches_by_kind, updates)
    except Exception as error:  # whatever a model's own code raises
        raise VerifyError(f"the dense model does not train in {precision}: {explain(error, reference)}") from error


def _run(reference: nn.Module, precision: str, batches_by_kind: Mapping[str, Batch], updates: list[Batch]) -> Outcome:
    outcome = Outcome()
    causal, options = batches_by_kind["causal"], _without_cache(reference)
    with _widened(precision):
        for kind, batch in batches_by_kind.items():
            scale = LossScale(enabled=precision == "fp16")
            outcome.loss[kind], outcome.gradients[kind] = _backward(reference, batch, scale)
            flat = [gradient.flatten().double() for gradient in outcome.gradients[kind].values()]
            outcome.norm[kind] = torch.cat(flat).norm()
        with torch.no_grad():
            outcome.logits = reference(input_ids=causal["input_ids"], **options)["logits"].detach()
        if precision in OWN_LOSS_PRECISIONS:
            output = reference(**causal, **options)
            (output["loss"] + own_loss(output["logits"])).backward()
            params = reference.named_parameters()
            outcome.own_gradients = {name: param.grad.detach() for name, param in params if param.grad is not None}
            reference.zero_grad(set_to_none=True)
        if updates:
            optimizer = torch.optim.AdamW([param for param in reference.parameters() if param.requires_grad], **OPTIMIZER)
            for batch in updates:
                _loss(reference, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            outcome.weights = {name: param.detach().clone() for name, param in reference.named_parameters()}
    return outcome


def without_dropout(model: nn.Module) -> tuple[nn.Module, dict[str, float]]:
    """A copy of a model that drops nothing; the model itself if it has no dropout.

    Returns:
        The copy, and the probabilities that it has as zero: by the keys of the configuration, or by the names of modules if no
        key of the configuration is a probability.
    """
    if not any(True for _ in _dropout_probabilities(model)):
        return model, {}
    copy = copy_model(model)
    zeroed = {}
    for name, owner, key, probability in list(_dropout_probabilities(copy)):
        setattr(owner, key, 0.0)
        zeroed[name] = probability
    return copy, {name: probability for name, probability in zeroed.items() if "." not in name} or zeroed


def _dropout_probabilities(model: nn.Module) -> Iterator[tuple[str, Any, str, float]]:
    """The probabilities to drop with: (a name for it, the configuration or module that has it, its key there, its value)."""
    owners = [("", config) for config in configs(model)] + [(f"{path}.", m) for path, m in model.named_modules()]
    for path, owner in owners:
        for key, value in vars(owner).items():
            is_probability = "drop" in key or (key == "p" and isinstance(owner, DropoutNd))
            if is_probability and isinstance(value, float) and value > 0:
                yield path + key, owner, key, value


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy of a model whose parameters have `dtype`.

    Floating-point buffers keep their dtype: rotary frequencies in bfloat16 would be other frequencies. Only float64 converts
    them. There a mixture's experts are computed one by one if their implementation takes no float64.
    """
    copy = copy_model(model)
    for module in copy.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if dtype == torch.float64 and buffer.is_floating_point():
                module._buffers[name] = buffer.double()
    _exact_attention(copy)
    if dtype == torch.float64:
        experts_of_any_dtype(copy, "eager")
    return copy


def _exact_attention(model: nn.Module) -> None:
    """Use the model's eager attention where there is a soft-cap, which SDPA drops silently in some releases of transformers."""
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "attn_logit_softcapping", None):
        config._attn_implementation = "eager"


def _without_cache(model: nn.Module) -> dict[str, Any]:
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch, **_without_cache(model))["loss"]


def _backward(model: nn.Module, batch: Batch, scale: LossScale) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its gradients by parameter name. Scaled ones are unscaled in float32: float16 would lose the small ones."""
    loss = _loss(model, batch)
    (loss * scale.scale).backward()
    scaled = {name: param.grad.detach() for name, param in model.named_parameters() if param.grad is not None}
    gradients = {name: grad.float() / scale.scale if scale.enabled else grad.clone() for name, grad in scaled.items()}
    model.zero_grad(set_to_none=True)
    if scale.enabled and scale.scale > 1 and not all(grad.isfinite().all() for grad in gradients.values()):
        scale.update(skipped=True)
        return _backward(model, batch, scale)
    return loss.detach(), gradients


@contextlib.contextmanager
def _widened(precision: str) -> Iterator[None]:
    with Widened() if precision == "fp64" else contextlib.nullcontext():
        yield
