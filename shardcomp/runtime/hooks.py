"""Hooks that training code registers on parameters: called once per backward pass, when the gradient is reduced.

Autograd cannot call them: it computes gradients of gathered copies, for one micro-batch, before anything is summed over ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardcomp.errors import PlanError
from shardcomp.ir.packed import PackedSlice, assemble
from shardcomp.runtime.gathering import full_tensor
from shardcomp.runtime.gradients import local

Hooks = Mapping[int, Callable[..., Any]]


@dataclass(frozen=True)
class DenseHooks:
    """The hooks that a parameter of the dense model had when the model was sharded.

    The mappings are torch's own, so that a handle still removes its hook. on_gradient: called with a gradient, whose
    replacement they may return. on_parameter: called with the parameter once its gradient is complete.
    """

    on_gradient: Hooks
    on_parameter: Hooks


def hooks_of(model: nn.Module) -> dict[str, DenseHooks]:
    """The hooks of a dense model's parameters, by the parameters' first names."""
    hooks_by_name = {}
    for name, p in model.named_parameters():
        hooks = DenseHooks(p._backward_hooks or {}, getattr(p, "_post_accumulate_grad_hooks", None) or {})
        if hooks.on_gradient or hooks.on_parameter:
            hooks_by_name[name] = hooks
    return hooks_by_name


@dataclass(frozen=True)
class DenseShard:
    """One rank's shard of a dense parameter.

    copies: the DTensors of the shard. part: the packed slice that it is of, if any. index: its slice of that, or of the
    parameter.
    """

    name: str
    copies: tuple[nn.Parameter, ...]
    part: PackedSlice | None
    index: tuple[slice, ...]


class ParameterHooks:
    """All hooks on the parameters of one rank.

    parameters: of this rank. dense: hooks from before the model was sharded, by the dense parameter's name. shards: this rank's
    shards of those. Such hooks see full tensors, as before, and every rank calls them with the same numbers. Hooks on sharded
    parameters see DTensors.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], dense: Mapping[str, DenseHooks], shards: Mapping[str, Sequence[DenseShard]]
    ) -> None:
        self._parameters, self._dense = parameters, dense
        self._shards = {name: shards[name] for name in dense if shards.get(name)}
        self._suspended: dict[nn.Parameter, Any] = {}

    def suspend(self) -> list[nn.Parameter]:
        """Called before a pass: FSDP shall not call hooks when it has reduced only over dp. Returns the parameters whose
        gradient of this pass a hook is to see."""
        hooked = [p for p in self._parameters if p._backward_hooks]
        hooked += [p for name in self._shards if self._dense[name].on_gradient for p in self._copies(name)]
        for p in self._parameters:
            hooks = getattr(p, "_post_accumulate_grad_hooks", None)
            if hooks:
                self._suspended[p] = hooks
                p._post_accumulate_grad_hooks = None  # type: ignore[attr-defined]
        return hooked

    def resume(self) -> None:
        """Called after a pass, however it ended."""
        for p, hooks in self._suspended.items():
            p._post_accumulate_grad_hooks = hooks  # type: ignore[attr-defined]
        self._suspended = {}

    def _copies(self, name: str) -> list[nn.Parameter]:
        return [p for shard in self._shards[name] for p in shard.copies]

    @torch.no_grad()
    def show_gradients(self) -> None:
        """Called when the gradients of a pass are reduced: hooks may replace them."""
        for name in self._shards:
            if not self._dense[name].on_gradient:
                continue
            gradient = self._joined(name, lambda p: p.grad)
            if gradient is None:
                continue
            for hook in list(self._dense[name].on_gradient.values()):
                replaced = hook(gradient)
                gradient = gradient if replaced is None else replaced
            self._distribute(name, gradient, lambda p: p.grad)
        for p in self._parameters:
            for hook in list((p._backward_hooks or {}).values()):
                if p.grad is not None:
                    replaced = hook(p.grad)
                    if replaced is not None:
                        p.grad = _as_gradient(replaced, p)

    @torch.no_grad()
    def show_parameters(self) -> None:
        """Called when gradients are complete."""
        for name in self._shards:
            hooks = list(self._dense[name].on_parameter.values())
            gradient = self._joined(name, lambda p: p.grad) if hooks else None
            if gradient is None:
                continue
            stand_in = nn.Parameter(self._joined(name, lambda p: p.detach()))  # type: ignore[arg-type]
            stand_in.grad = gradient
            for hook in hooks:
                hook(stand_in)
            self._distribute(name, stand_in.detach(), lambda p: p.detach())
            if stand_in.grad is not None:
                self._distribute(name, stand_in.grad, lambda p: p.grad)
            else:
                for p in self._copies(name):
                    p.grad = None
        for p in self._parameters:
            for hook in list((getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()):
                if p.grad is not None:
                    hook(p)

    def _joined(self, name: str, read: Callable[[nn.Parameter], Tensor | None]) -> Tensor | None:
        """The full tensor of a dense parameter, a packed one assembled; None where no shard has one."""
        tensors = {}
        for shard in self._shards[name]:
            tensor = read(shard.copies[0])
            if tensor is not None:
                tensors[shard.name] = full_tensor(tensor).clone()
        if not tensors:
            return None
        parts = {shard.name: shard.part for shard in self._shards[name]}
        return tensors[name] if name in tensors else assemble(name, parts, tensors)

    def _distribute(self, name: str, tensor: Tensor, write: Callable[[nn.Parameter], Tensor | None]) -> None:
        """Copy its slice of the full tensor to every shard of this rank."""
        for shard in self._shards[name]:
            slice_ = shard.part.read(lambda _, index: tensor[index], shard.index) if shard.part else tensor[shard.index]
            for p in shard.copies:
                target = write(p)
                if target is not None:
                    local(target).copy_(slice_)


def _as_gradient(tensor: Tensor, p: nn.Parameter) -> Tensor:
    """What a hook returned, with the placements of its parameter's gradient."""
    if not isinstance(tensor, DTensor):
        raise PlanError(
            f"a hook on a sharded parameter of shape {tuple(p.shape)} returned a plain tensor of shape {tuple(tensor.shape)}: "
            "return a DTensor made of the gradient that it was given, or register the hook before sharding; it then sees the "
            "whole gradient"
        )
    same = isinstance(p.grad, DTensor) and tensor.placements == p.grad.placements
    return tensor if same or p.grad is None else tensor.redistribute(placements=p.grad.placements)  # type: ignore[attr-defined]
