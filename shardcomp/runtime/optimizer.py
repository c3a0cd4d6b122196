"""AdamW as torch has it, with clipping, loss scale and skipped steps within the one pass over weights and moments."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardcomp.kernels.adamw import COMPUTED, adamw_
from shardcomp.runtime.gradients import coefficient, local


class AdamW(torch.optim.Optimizer):
    """torch.optim.AdamW, for which gradients are read once and nothing is waited for.

    Its options mean the same, and so do its states `step`, `exp_avg` and `exp_avg_sq`: either goes on from what the other
    saved. A parameter in bfloat16 or float16 is trained in float32: it has a fourth state, `master`, whose rounding it is, and
    moments in float32. A parameter that is changed by other hands afterwards is to lose its state too. DTensors are updated
    piece by piece, with no collectives.

    Under a `torch.amp.GradScaler` its `grad_scale` and `found_inf` are followed, as torch's fused optimizers do.
    params, lr (a number, or in a tensor of one element), betas, eps, weight_decay, maximize: as in torch.optim.AdamW. Raises
    ValueError for options out of their range, and for parameters of another dtype than float64, float32, bfloat16 or float16.
    """

    grad_scale: Tensor
    """[], where it is there: what gradients are to be divided by, being those of a scaled loss."""
    found_inf: Tensor
    """[], where it is there: where it is not zero, a step changes nothing."""

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
    ) -> None:
        wrong = [
            f"{name} = {value}: use {legal}"
            for name, value, legal, good in (
                ("lr", lr, "0 or more, in a tensor one of one element", torch.as_tensor(lr).numel() == 1 and lr >= 0),
                ("betas", betas, "two numbers from 0 to below 1", len(betas) == 2 and all(0 <= beta < 1 for beta in betas)),
                ("eps", eps, "0 or more", eps >= 0),
                ("weight_decay", weight_decay, "0 or more", weight_decay >= 0),
            )
            if not good
        ]
        if wrong:
            raise ValueError("; ".join(wrong))
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        # The options that only torch's has are kept, with no effect: a torch.distributed.checkpoint has to hold them.
        super().__init__(params, torch.optim.AdamW([torch.empty(0)]).defaults | options)
        self._step_supports_amp_scaling = True  # a GradScaler leaves both attributes above to the step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch has it. Raises ValueError for parameters of a dtype that cannot be trained."""
        super().add_param_group(param_group)
        strange = {str(p.dtype) for p in self.param_groups[-1]["params"] if p.dtype not in COMPUTED}
        if strange:
            self.param_groups.pop()
            known = ", ".join(str(dtype) for dtype in COMPUTED)
            raise ValueError(f"parameters of {', '.join(sorted(strange))} cannot be trained by AdamW; these can: {known}")

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        norm: Tensor | None = None,
        max_norm: float = math.inf,
    ) -> float | None:
        """Update every parameter that has a gradient.

        norm: [], the norm of all gradients as they stand, such as `ShardedModel.grad_norm()`. With it, the step is that of
        gradients scaled to a norm of at most `max_norm`; if it is not finite, nothing changes. The gradients themselves stay
        as they are. Raises ValueError for a `max_norm` without a norm, and for groups that came from an AMSGrad.
        """
        if norm is None and max_norm != math.inf:
            raise ValueError(f"max_norm = {max_norm} needs norm=, the norm of all gradients, to scale them by")
        _check_options(self.param_groups)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale, found_inf = self._from_norm(norm, max_norm)
        for group in self.param_groups:
            alike: dict[tuple[Any, ...], list[Any]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    gradient = _like_parameter(p.grad, p)
                    alike.setdefault((gradient.device, p.dtype), []).append((p, gradient))
            for (device, _), pairs in alike.items():
                self._update(group, device, pairs, _on(device, scale), _on(device, found_inf))
        return loss

    def _from_norm(self, norm: Tensor | None, max_norm: float) -> tuple[Tensor | None, Tensor | None]:
        """What gradients are to be multiplied by, and where there is to be no step."""
        scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if scale is not None:
            scale = scale.reshape(()).reciprocal()
        if norm is not None:
            unscaled = norm if scale is None else norm * scale
            clip = coefficient(unscaled, max_norm)
            scale = clip if scale is None else clip * scale
            bad = (~norm.isfinite()).float()
            found_inf = bad if found_inf is None else bad + _on(bad.device, found_inf).reshape(())  # type: ignore[union-attr]
        return scale, found_inf

    def _update(
        self,
        group: dict[str, Any],
        device: torch.device,
        pairs: list[tuple[Tensor, Tensor]],
        scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        lr = group["lr"]
        lr = lr.reshape(()) if isinstance(lr, Tensor) else torch.full((), lr, dtype=torch.float64, device=device)
        states = [self._state_of(p) for p, _ in pairs]
        parameters = [local(p) for p, _ in pairs]
        narrow = parameters[0].dtype != COMPUTED[parameters[0].dtype]
        adamw_(
            [local(state["master"]) for state in states] if narrow else parameters,
            parameters if narrow else [],
            [gradient for _, gradient in pairs],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            [state["step"] for state in states],
            lr.to(device, torch.float64, non_blocking=True),
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            maximize=group["maximize"],
            scale=scale,
            found_inf=found_inf,
        )
        # A graph that saved these weights is to notice, as after any operator in place.
        torch.autograd.graph.increment_version(parameters)

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        """The states of a parameter: made where they are missing, and put where it is."""
        state: dict[str, Any] = self.state[p]
        wide = COMPUTED[p.dtype]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, dtype=wide)
            state["exp_avg_sq"] = torch.zeros_like(p, dtype=wide)
        if state["step"].device != p.device:  # torch keeps it on the host
            state["step"] = state["step"].to(p.device)
        if wide != p.dtype and "master" not in state:
            state["master"] = p.detach().to(wide)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Go on from what this `state_dict`, or torch.optim.AdamW's, gave. Raises ValueError for that of an AMSGrad."""
        _check_options(state_dict["param_groups"])
        super().load_state_dict(dict(state_dict))
        # torch gave every state the dtype of its parameter. A master that was saved in a narrow dtype is one which torch's own
        # AdamW carried along and did not update: the parameter is newer.
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for key, p in zip(saved["params"], group["params"], strict=True):
                wide = COMPUTED[p.dtype]
                for name, given in state_dict["state"].get(key, {}).items():
                    if name == "master" and (wide == p.dtype or given.dtype != wide):
                        del self.state[p][name]
                    elif name != "step":
                        self.state[p][name] = given.to(p.device, wide)


def _check_options(groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse what torch's own may be given and this one has not."""
    if any(group.get("amsgrad") for group in groups):
        raise ValueError("amsgrad = True: shardcomp.AdamW has no AMSGrad; go on with torch.optim.AdamW(..., amsgrad=True)")


def _like_parameter(gradient: Tensor, p: Tensor) -> Tensor:
    """This rank's piece of a gradient, laid out as its parameter is."""
    if isinstance(p, DTensor) and isinstance(gradient, DTensor) and gradient.placements != p.placements:
        gradient = gradient.redistribute(placements=p.placements)
    return local(gradient)


def _on(device: torch.device, number: Tensor | None) -> Tensor | None:
    return None if number is None else number.to(device, non_blocking=True)
