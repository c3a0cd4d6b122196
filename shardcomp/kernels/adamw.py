"""AdamW (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101) on lists of tensors, in one pass over each element: gradient,
weight and moments are read once and written once, and a copy of the weight in a narrower dtype is written beside it.

What a step depends on is read where the tensors are, so that nothing waits for it: the learning rate, the factor of the
gradients, whether there is a step at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardcomp.kernels.register import define

COMPUTED = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
"""The dtype that a parameter is updated in, by its own: where they differ, a weight in the first is kept beside it."""


def adamw_(
    weights: Sequence[Tensor],
    copies: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: Tensor,
    *,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    maximize: bool = False,
    scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step of AdamW for each of `weights`, in place.

    weights: float32, or all float64; each element is computed in that dtype. exp_avgs, exp_avg_sqs: the moments, like the
    weights. copies: none, or for each weight one in bfloat16 or float16 that becomes the new weight, rounded. gradients: of any
    of these dtypes. steps: float32 [] each, how many steps were made, which becomes one more. All of these are lists of one
    length, the tensors of a place alike in shape and all on one device.
    lr: float64 []. scale: [], what each gradient is multiplied by before anything else. found_inf: []; where it is not zero,
    nothing changes. All three are read on the device.
    With t steps made and g the gradient: m becomes β₁ m + (1 - β₁) g, v becomes β₂ v + (1 - β₂) g², and w becomes
    w (1 - lr · weight_decay) - lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + eps), what does not depend on the element in float64.
    Raises ValueError for lists that do not fit together.
    """
    _check(weights, copies, gradients, exp_avgs, exp_avg_sqs, steps)
    if weights:
        torch.ops.shardcomp.adamw_(
            weights, copies, gradients, exp_avgs, exp_avg_sqs, steps, lr, *betas, eps, weight_decay, maximize, scale, found_inf
        )


def _check(weights: Sequence[Tensor], copies: Sequence[Tensor], *others: Sequence[Tensor]) -> None:
    """Whether the lists fit together."""
    names = ("gradients", "exp_avgs", "exp_avg_sqs", "steps")
    lists = {"weights": weights, **({"copies": copies} if copies else {}), **dict(zip(names, others, strict=True))}
    lengths = {name: len(held) for name, held in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"adamw_: lists of one length are needed, but there are {lengths}")
    dtype = weights[0].dtype if weights else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"adamw_: weights are {dtype}; give float32 ones, and these as copies")
    like: dict[str, tuple[torch.dtype, ...]] = {
        "weights": (dtype,),
        "exp_avgs": (dtype,),
        "exp_avg_sqs": (dtype,),
        "steps": (torch.float32,),
    }
    like |= {"copies": (torch.bfloat16, torch.float16), "gradients": tuple(COMPUTED)}
    for name, held in lists.items():
        for at, (each, weight) in enumerate(zip(held, weights, strict=True)):
            shape = torch.Size() if name == "steps" else weight.shape
            if each.shape != shape or each.dtype not in like[name] or each.device != weights[0].device:
                wanted = f"{_either(like[name])} {tuple(shape)} on {weights[0].device}"
                raise ValueError(f"adamw_: {name}[{at}] is {each.dtype} {tuple(each.shape)} on {each.device}, not {wanted}")


def _either(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype) for dtype in dtypes)


def _reference(
    weights: list[Tensor],
    copies: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: bool,
    scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    for at, (weight, gradient, m, v, step) in enumerate(zip(weights, gradients, exp_avgs, exp_avg_sqs, steps, strict=True)):
        g = gradient.to(weight.dtype)
        if scale is not None:
            g = g * scale
        if maximize:
            g = -g
        count = step + 1
        size = lr.double() / (1 - beta1 ** count.double())
        root = (1 - beta2 ** count.double()).sqrt()
        first = m.lerp(g, 1 - beta1)
        second = (v * beta2).addcmul_(g, g, value=1 - beta2)
        change = first / second.sqrt().div_(root).add_(eps)
        moved = (weight * (1 - lr.double() * weight_decay)).sub_(change.mul_(size))
        updated = [(weight, moved), (m, first), (v, second), (step, count)]
        if copies:
            updated.append((copies[at], moved.to(copies[at].dtype)))
        for held, new in updated:
            held.copy_(new if found_inf is None else torch.where(found_inf.reshape(()) == 0, new, held))


define(
    "adamw_(Tensor(a!)[] weights, Tensor(b!)[] copies, Tensor[] gradients, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
    "Tensor(e!)[] steps, Tensor lr, float beta1, float beta2, float eps, float weight_decay, bool maximize, Tensor? scale, "
    "Tensor? found_inf) -> ()",
    _reference,
    lambda *arguments: None,
)
