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
    """torch.optim.AdamW that reads gradients once and never waits for the device.

    Its options and its states `step`, `exp_avg` and `exp_avg_sq` are torch's: each resumes from what the other saved. DTensors
    are updated shard by shard, without collectives. A parameter in bfloat16 or float16 has float32 moments and a fourth state,
    `master`: its value in float32, which the parameter is rounded from. Delete the state of such a parameter after changing it
    by other means. `torch.amp.GradScaler` works as with torch's fused optimizers.

    Args:
        params: parameters or groups, as in torch, in float64, float32, bfloat16 or float16.
        lr: the learning rate, a number or a tensor of one element.
        betas, eps, weight_decay, maximize: as in torch.

    Raises:
        ValueError: for options out of range, and for parameters of other dtypes.

    Example:
        >>> optimizer = shardcomp.AdamW(sharded.parameters(), lr=1e-4, betas=(0.9, 0.95))
    """

    grad_scale: Tensor
    """[], the scale of the loss that gradients are of; not set where there is none."""
    found_inf: Tensor
    """[], not zero where a step must change nothing; not set where nobody looked."""

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
        # Options that only torch has are in the groups too, without effect: torch.distributed.checkpoint looks for them.
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
        """Update every parameter that has a gradient. The gradients do not change.

        Args:
            closure: computes the loss again, as in torch.
            norm: [], of all gradients, such as `ShardedModel.grad_norm()` returns. If it is not finite, nothing changes.
            max_norm: what gradients are clipped to, with `norm`.

        Returns:
            The closure's loss, or None.

        Raises:
            ValueError: for a `max_norm` without a norm, and for groups of an AMSGrad.

        Example:
            >>> optimizer = shardcomp.AdamW(sharded.parameters())
            >>> step = sharded.train_step(input_ids=ids, labels=ids)
            >>> optimizer.step(norm=sharded.grad_norm(), max_norm=1.0)
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
        """(what to multiply gradients by, where not to step): None for neither."""
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
        # Autograd raises for a graph that saved these weights, as after any operator in place.
        torch.autograd.graph.increment_version(parameters)

    def _state_of(self, p: Tensor) -> dict[str, Any]:
        """The states of a parameter, on its device; new ones where they are missing."""
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
        """Resume from a `state_dict` of this class or of torch.optim.AdamW. Raises ValueError for one of an AMSGrad."""
        _check_options(state_dict["param_groups"])
        super().load_state_dict(dict(state_dict))
        # torch cast every state to the dtype of its parameter, so take the saved ones. A master in a narrow dtype went through
        # torch's own AdamW, which did not update it: the parameter is newer.
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=True):
            for key, p in zip(saved["params"], group["params"], strict=True):
                wide = COMPUTED[p.dtype]
                for name, tensor in state_dict["state"].get(key, {}).items():
                    if name == "master" and (wide == p.dtype or tensor.dtype != wide):
                        del self.state[p][name]
                    elif name != "step":
                        self.state[p][name] = tensor.to(p.device, wide)


def _check_options(groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse the option of torch's AdamW that this one lacks."""
    if any(group.get("amsgrad") for group in groups):
        raise ValueError("amsgrad = True: shardcomp.AdamW has no AMSGrad; go on with torch.optim.AdamW(..., amsgrad=True)")


def _like_parameter(gradient: Tensor, p: Tensor) -> Tensor:
    """This rank's shard of a gradient, with the placements of its parameter."""
    if isinstance(p, DTensor) and isinstance(gradient, DTensor) and gradient.placements != p.placements:
        gradient = gradient.redistribute(placements=p.placements)
    return local(gradient)


def _on(device: torch.device, number: Tensor | None) -> Tensor | None:
    return None if number is None else number.to(device, non_blocking=True)
