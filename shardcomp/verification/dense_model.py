"""The dense side of a comparison: the unmodified model on the whole batch, in one process, and the batches themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from shardcomp.capture.copying import copy_model
from shardcomp.capture.export import explain
from shardcomp.capture.fake_model import configs, experts_of_any_dtype
from shardcomp.errors import VerifyError
from shardcomp.ir.precision import COMPUTE, Widened
from shardcomp.runtime.loss_scale import LossScale

Batch = dict[str, Tensor]
IGNORED = -100
KINDS = ("causal", "padded", "packed")
"""Batches without further inputs, with an attention mask, and with positions that start again within a row."""


@dataclass
class Outcome:
    """What one run of a plan, or of the dense model, gave: per batch kind the loss, the gradients and their norm; and once the
    logits, the gradients of the model's loss plus one of the user's own, and the weights after some optimizer steps."""

    loss: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    norm: dict[str, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None
    own: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


OWN = ("fp64", "fp32")
"""The precisions in which a loss of the user's own is compared."""
OPTIMIZER: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
STEPS = 3


def batches(vocabulary: int, rows: int, length: int, seed: int) -> dict[str, Batch]:
    """A batch of each kind: causal, padded (left and right), packed. Every row is distinct, and each has its own share of
    labels that do not count, so that a mean of means is not the mean."""
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
        gap = 1 + (row * 3) % (length // 2)
        at = slice(0, gap) if row % 2 else slice(length - gap, length)
        mask[row, at] = 0
        cut = 1 + (row * 5) % (length - 2)
        positions[row] = torch.cat([torch.arange(cut), torch.arange(length - cut)])
    padded["attention_mask"] = mask
    # Nor does what padding predicts: behind padding on the left nothing is seen, and attention to nothing is anything.
    padded["labels"] = torch.where((mask == 0) | (mask.roll(1, 1) == 0), IGNORED, padded["labels"])
    packed["position_ids"] = positions
    return dict(zip(KINDS, (base(), padded, packed), strict=True))


def own_loss(logits: Tensor) -> Tensor:
    """A loss as users compute it from whole logits, a sum over samples: a z-loss."""
    return 1e-3 * torch.logsumexp(logits, -1).square().sum()


def steps(vocabulary: int, rows: int, length: int, seed: int) -> list[Batch]:
    """The batches of the optimizer steps."""
    return [batches(vocabulary, rows, length, seed + 1 + i)["causal"] for i in range(STEPS)]


def dense(model: nn.Module, precision: str, given: Mapping[str, Batch], updates: list[Batch]) -> Outcome:
    """Run the dense model. `precision` fp64 widens every cast of the model; bf16 and fp16 compute in 16 bits, fp16 under the
    largest loss scale whose gradients are finite. VerifyError where the model fails by itself."""
    reference = in_dtype(model, COMPUTE[precision]).train()
    try:
        return _outcome(reference, precision, given, updates)
    except Exception as error:  # whatever a model's own code raises
        raise VerifyError(f"the dense model does not train in {precision}: {explain(error, reference)}") from error


def _outcome(reference: nn.Module, precision: str, given: Mapping[str, Batch], updates: list[Batch]) -> Outcome:
    found = Outcome()
    with _widened(precision):
        for kind, batch in given.items():
            found.loss[kind], found.gradients[kind] = _backward(reference, batch, LossScale(enabled=precision == "fp16"))
            every = [gradient.flatten().double() for gradient in found.gradients[kind].values()]
            found.norm[kind] = torch.cat(every).norm()
        with torch.no_grad():
            found.logits = reference(input_ids=given["causal"]["input_ids"], **_without_cache(reference))["logits"].detach()
        if precision in OWN:
            out = reference(**given["causal"], **_without_cache(reference))
            (out["loss"] + own_loss(out["logits"])).backward()
            found.own = {name: p.grad.detach() for name, p in reference.named_parameters() if p.grad is not None}
            reference.zero_grad(set_to_none=True)
        if updates:
            optimizer = torch.optim.AdamW([p for p in reference.parameters() if p.requires_grad], **OPTIMIZER)
            for batch in updates:
                _loss(reference, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            found.weights = {name: p.detach().clone() for name, p in reference.named_parameters()}
    return found


def without_dropout(model: nn.Module) -> tuple[nn.Module, dict[str, float]]:
    """A copy that drops nothing, the model itself where nothing drops, and the probabilities that were set to zero: by the keys
    of the configuration, or where that has none, by the names of modules."""
    if not any(True for _ in _dropping(model)):
        return model, {}
    twin = copy_model(model)
    zeroed = {}
    for name, holder, key, p in list(_dropping(twin)):
        setattr(holder, key, 0.0)
        zeroed[name] = p
    return twin, {name: p for name, p in zeroed.items() if "." not in name} or zeroed


def _dropping(model: nn.Module) -> Iterator[tuple[str, Any, str, float]]:
    """What holds a probability to drop with: (its name, the configuration or module, the key there, the probability)."""
    holders = [("", config) for config in configs(model)] + [(f"{path}.", m) for path, m in model.named_modules()]
    for path, holder in holders:
        for key, held in vars(holder).items():
            named = "drop" in key or (key == "p" and isinstance(holder, _DropoutNd))
            if named and isinstance(held, float) and held > 0:
                yield path + key, holder, key, held


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy whose parameters have `dtype`. Floating buffers keep the dtype they were computed in, except in float64, where a
    mixture's experts are computed one by one if the implementation that is set takes no float64."""
    twin = copy_model(model)
    for module in twin.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        for name, buffer in module.named_buffers(recurse=False):
            if dtype == torch.float64 and buffer.is_floating_point():
                module._buffers[name] = buffer.double()
    _exact_attention(twin)
    if dtype == torch.float64:
        experts_of_any_dtype(twin, "eager")
    return twin


def _exact_attention(model: nn.Module) -> None:
    """SDPA drops a soft-cap silently in some versions; there the model's eager attention is the reference."""
    config = getattr(model, "config", None)
    if config is not None and getattr(config, "attn_logit_softcapping", None):
        config._attn_implementation = "eager"


def _without_cache(model: nn.Module) -> dict[str, Any]:
    return {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch, **_without_cache(model))["loss"]


def _backward(model: nn.Module, batch: Batch, scale: LossScale) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its gradients, of float32 where they were scaled: in float16 the small ones vanish without the scale."""
    loss = _loss(model, batch)
    (loss * scale.scale).backward()
    held = {name: p.grad.detach() for name, p in model.named_parameters() if p.grad is not None}
    gradients = {name: grad.float() / scale.scale if scale.enabled else grad.clone() for name, grad in held.items()}
    model.zero_grad(set_to_none=True)
    if scale.enabled and scale.scale > 1 and not all(grad.isfinite().all() for grad in gradients.values()):
        scale.update(skipped=True)
        return _backward(model, batch, scale)
    return loss.detach(), gradients


@contextlib.contextmanager
def _widened(precision: str) -> Iterator[None]:
    with Widened() if precision == "fp64" else contextlib.nullcontext():
        yield
