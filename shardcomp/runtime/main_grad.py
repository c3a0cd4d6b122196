"""`main_grad`: the gradient of a weight in the masters' dtype, accumulated over micro-batches. Megatron-LM's name for it.

FSDP would round each micro-batch's gradient to the compute dtype and read it again to accumulate it. Here the matrix product
that computes the gradient adds to the accumulated one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from shardcomp.kernels.wide_matmul import add_product, matmul, product
from shardcomp.runtime.fsdp import matrices
from shardcomp.runtime.stage_shard import StageShard


class MainGrad:
    """The accumulated gradient of one weight, until FSDP reduces it over dp.

    group, param: FSDP's own FSDPParamGroup and FSDPParam, which keep the accumulated tensor.
    """

    def __init__(self, group: Any, param: Any) -> None:
        self._group, self._param = group, param

    @property
    def weight(self) -> Tensor:
        """The gathered parameter, the leaf of autograd's graph."""
        weight: Tensor = self._param.unsharded_param
        return weight

    def add(self, grad_output: Tensor, x: Tensor) -> Tensor | None:
        """Accumulate `grad_output`ᵀ x, the gradient of one micro-batch: [out, in] of [rows, out] and [rows, in].

        Returns None. Where FSDP reduces this micro-batch's gradient at once, and nothing is accumulated yet, it returns the
        gradient instead, in the dtype of its operands, for autograd to hand to `weight`.
        """
        accumulated = self._param.unsharded_accumulated_grad
        if accumulated is not None:
            local = accumulated.to_local() if isinstance(accumulated, DTensor) else accumulated
            add_product(local, grad_output.t(), x)
            return None
        if self._group.reduce_grads:
            return self._like_weight(matmul(grad_output.t(), x))
        self._param.unsharded_accumulated_grad = self._like_weight(product(grad_output.t(), x, self._param.reduce_dtype))
        return None

    def _like_weight(self, gradient: Tensor) -> Tensor:
        """A local gradient as a DTensor with the weight's placements, if the weight is one."""
        weight = self.weight
        if not isinstance(weight, DTensor):
            return gradient
        return DTensor.from_local(
            gradient, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )


def accumulate_in_main_grads(stage_shard: StageShard) -> None:
    """Give every matrix of a stage a `MainGrad`. Called once, where gradients are reduced in a wider dtype than they are
    computed in.

    Units under a split backward get none: torch tells the two halves apart by the gradients that autograd hands to weights,
    and `MainGrad` takes these away from autograd.
    """
    by_place: dict[tuple[int, str], MainGrad] = {}
    for group, param, places in matrices(stage_shard):
        by_place.update({(id(module._parameters), attribute): MainGrad(group, param) for module, attribute in places})
    for unit_params in stage_shard.unit_parameters:
        keys = {name: (id(module._parameters), attribute) for name, (module, attribute) in unit_params.places.items()}
        unit_params.main_grads = (
            {} if unit_params.splits else {name: by_place[key] for name, key in keys.items() if key in by_place}
        )
