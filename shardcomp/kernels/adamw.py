"""AdamW (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101) on lists of tensors, in one pass over each element.

Gradient, weight and moments are read once and written once; a copy of the weight in a narrower dtype is written with them. The
learning rate, the scale of the gradients and the decision to skip a step stay on the device: the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shardcomp.kernels.register import define, register
from shardcomp.kernels.small_cases import Calls, Samples

COMPUTED = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
"""Dtype of a parameter -> dtype of its update. Where they differ, the optimizer keeps a weight in the wider one."""


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

    After step t with gradient g: m = β₁ m + (1 - β₁) g, v = β₂ v + (1 - β₂) g², and
    w = w (1 - lr · weight_decay) - lr / (1 - β₁ᵗ) · m / (√v / √(1 - β₂ᵗ) + eps). Factors of a whole tensor are computed in
    float64, elements in the dtype of the weight.

    The lists have one length; tensors at one index have one shape. All tensors are on one device.

    Args:
        weights: float32, or all float64.
        copies: empty, or for each weight a bfloat16 or float16 tensor that receives the new weight, rounded.
        gradients: bfloat16, float16, float32 or float64.
        exp_avgs: the first moments m, in the dtype of the weights.
        exp_avg_sqs: the second moments v, in the dtype of the weights.
        steps: float32 [] each, the number of steps so far; increased by one.
        lr: float64 [].
        betas: β₁ and β₂.
        eps: added to the root of the second moment.
        weight_decay: decoupled from the gradient.
        maximize: ascend instead of descend.
        scale: [], multiplies each gradient first, such as 1 / loss scale or a clipping factor.
        found_inf: []; where it is not zero, nothing changes.

    Raises:
        ValueError: lengths, shapes, dtypes or devices do not fit together.

    Example:
        >>> import torch
        >>> weight, gradient, m, v = torch.ones(2), torch.ones(2), torch.zeros(2), torch.zeros(2)
        >>> step, lr = torch.zeros(()), torch.tensor(0.1, dtype=torch.float64)
        >>> adamw_([weight], [], [gradient], [m], [v], [step], lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
        >>> weight, step
        (tensor([0.9000, 0.9000]), tensor(1.))
    """
    _check(weights, copies, gradients, exp_avgs, exp_avg_sqs, steps)
    if weights:
        torch.ops.shardcomp.adamw_(
            weights, copies, gradients, exp_avgs, exp_avg_sqs, steps, lr, *betas, eps, weight_decay, maximize, scale, found_inf
        )


def _check(weights: Sequence[Tensor], copies: Sequence[Tensor], *others: Sequence[Tensor]) -> None:
    """Raise ValueError unless the lists fit together."""
    names = ("gradients", "exp_avgs", "exp_avg_sqs", "steps")
    lists = {"weights": weights, **({"copies": copies} if copies else {}), **dict(zip(names, others, strict=True))}
    lengths = {name: len(tensors) for name, tensors in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"adamw_: lists of one length are needed, but there are {lengths}")
    dtype = weights[0].dtype if weights else torch.float32
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"adamw_: weights are {dtype}; give float32 ones, and these as copies")
    allowed: dict[str, tuple[torch.dtype, ...]] = {
        "weights": (dtype,),
        "exp_avgs": (dtype,),
        "exp_avg_sqs": (dtype,),
        "steps": (torch.float32,),
    }
    allowed |= {"copies": (torch.bfloat16, torch.float16), "gradients": tuple(COMPUTED)}
    for name, tensors in lists.items():
        for at, (tensor, weight) in enumerate(zip(tensors, weights, strict=True)):
            shape = torch.Size() if name == "steps" else weight.shape
            if tensor.shape != shape or tensor.dtype not in allowed[name] or tensor.device != weights[0].device:
                needed = f"{_either(allowed[name])} {tuple(shape)} on {weights[0].device}"
                raise ValueError(
                    f"adamw_: {name}[{at}] is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, not {needed}"
                )


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
        # In float64: 1 - beta ** t loses digits in float32 while t is small.
        size = lr.double() / (1 - beta1 ** count.double())
        root = (1 - beta2 ** count.double()).sqrt()
        first = m.lerp(g, 1 - beta1)
        second = (v * beta2).addcmul_(g, g, value=1 - beta2)
        change = first / second.sqrt().div_(root).add_(eps)
        new_weight = (weight * (1 - lr.double() * weight_decay)).sub_(change.mul_(size))
        updated = [(weight, new_weight), (m, first), (v, second), (step, count)]
        if copies:
            updated.append((copies[at], new_weight.to(copies[at].dtype)))
        # `where` and not a product with zero: a skipped step leaves no NaN behind.
        for old, new in updated:
            old.copy_(new if found_inf is None else torch.where(found_inf.reshape(()) == 0, new, old))


define(
    "adamw_(Tensor(a!)[] weights, Tensor(b!)[] copies, Tensor[] gradients, Tensor(c!)[] exp_avgs, Tensor(d!)[] exp_avg_sqs, "
    "Tensor(e!)[] steps, Tensor lr, float beta1, float beta2, float eps, float weight_decay, bool maximize, Tensor? scale, "
    "Tensor? found_inf) -> ()",
    _reference,
    lambda *arguments: None,
)


def _cases(samples: Samples) -> Calls:
    x, y = samples.vector(), samples.vector()
    weights, one = [x.float(), y.float()], torch.tensor(1.0)
    copies = [x.clone(), y.clone()] if samples.dtype.itemsize == 2 else []
    moments, squares = [weight / 9 for weight in weights], [weight.square() for weight in weights]
    numbers = (one.double() / 9, 0.9, 0.95, 1e-8, 0.1, False, one / 3, None)
    return {"adamw_": (weights, copies, [y, x], moments, squares, [one.clone(), one.clone()], *numbers)}


register(adamw_, cases=_cases)
