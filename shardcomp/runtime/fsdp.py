"""What FSDP does around the units of a stage, step by step. Only this file uses its private names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState
from torch.distributed.tensor import DTensor

from shardcomp.errors import InternalError, PlanError
from shardcomp.kernels.wide_matmul import add_product, product
from shardcomp.runtime.allocation import StageShard


def prepare(stage_shard: StageShard, reduce: bool, last: bool) -> None:
    """What FSDP does in the backward that comes: whether it sums gradients over dp, and what it puts back in pieces: all behind
    the last backward of a step, before that the units whose plan says so."""
    stage_shard.root.set_requires_gradient_sync(reduce)  # type: ignore[operator]
    for module in stage_shard.groups:
        module.set_reshard_after_backward(last or stage_shard.reshards(module), recurse=False)
        for group in _parameter_groups(module):
            group.reduce_grads = reduce and not _alone(group)


def _alone(group: Any) -> bool:
    """Whether there is nobody to sum gradients with: they are handed on as they are. Left to FSDP, they would be copied three
    times over."""
    return bool(group.mesh_info.mesh.size() == 1) and not any(each.offload_to_cpu for each in group.fsdp_params)


@torch.no_grad()
def finish_unreduced_grads(stage_shard: StageShard) -> None:
    """Called behind the last backward: what FSDP was not to sum over dp becomes the gradients of the pieces, or is added to
    those that stand."""
    for group in (group for module in stage_shard.groups for group in _parameter_groups(module) if _alone(group)):
        for each in group.fsdp_params:
            if not hasattr(each, "_unsharded_param"):  # its unit has not run
                continue
            copy, piece = each.unsharded_param, each.sharded_param
            if each.unsharded_accumulated_grad is not None:
                gradient = each.unsharded_accumulated_grad_data
            elif copy.grad is not None:
                gradient = each.unsharded_grad_data
            else:
                continue
            each.unsharded_accumulated_grad = copy.grad = None
            if piece.grad is None:
                piece.grad = each.to_sharded_dtensor(gradient.to(each.orig_dtype))
            else:
                piece.grad.to_local().add_(gradient)


def sharded_parameters(stage_shard: StageShard) -> Iterator[Any]:
    """The parameters that an optimizer updates, also while gathered copies stand in their place."""
    for module in stage_shard.groups:
        for group in _parameter_groups(module):
            yield from (each.sharded_param for each in group.fsdp_params)
    yield from stage_shard.scalars


class _Scalar:
    """A parameter that FSDP does not take, read as one that it does."""

    def __init__(self, module: torch.nn.Module, leaf: str) -> None:
        self._module, self._leaf = module, leaf

    @property
    def sharded_param(self) -> Any:
        return self._module._parameters[self._leaf]


def named_parameters(stage_shard: StageShard) -> list[tuple[str, Any]]:
    """The parameters of a stage by their names in the model. `sharded_param` of each is what an optimizer updates, also while a
    gathered copy stands in its place."""
    entries = {}
    for module in stage_shard.groups:
        for group in _parameter_groups(module):
            entries.update({_name_of(stage_shard, each._module_info): each for each in group.fsdp_params})
    for module, leaf in stage_shard.scalar_places:
        entries[_name_at(stage_shard, module, leaf)] = _Scalar(module, leaf)
    return list(entries.items())


def check_not_replaced(stage_shard: StageShard) -> None:
    """Raise PlanError where something else stands in the place of a parameter that FSDP knows, as under
    `torch.func.functional_call`: it would be listed, and the old one used."""
    for module in stage_shard.groups:
        for param in (param for group in _parameter_groups(module) for param in group.fsdp_params):
            info, sharded = param._module_info, param.sharded_state == ShardedState.SHARDED
            now = info.module._parameters[info.param_name]
            if now is not (param.sharded_param if sharded else param._unsharded_param):
                raise PlanError(
                    f"{_name_of(stage_shard, info)} of the sharded model was replaced by another tensor, which its code would "
                    "not use: copy numbers into it, under torch.no_grad(): parameter.copy_(...), or load_state_dict(...)"
                )


def _name_of(stage_shard: StageShard, info: Any) -> str:
    return _name_at(stage_shard, info.module, info.param_name)


def _name_at(stage_shard: StageShard, holder: torch.nn.Module, attribute: str) -> str:
    """The name in the model of the parameter that a module of this rank holds."""
    at = id(holder._parameters), attribute
    for home, unit in zip(stage_shard.unit_parameters, stage_shard.units, strict=True):
        for short, (module, leaf) in home.places.items():
            if (id(module._parameters), leaf) == at:
                return unit.parameters[short]
    raise InternalError(f"no unit has the parameter {attribute}")


def use_separate_gather_buffers(stage_shard: StageShard) -> None:
    """Called once: of a group that is put back in pieces, no buffer of a gather outlives its copies. Else FSDP keeps that of
    the unit that computes while the next one is gathered: three units at once."""
    for module in stage_shard.groups:
        if stage_shard.reshards(module):
            module._set_unshard_async_op(True)


def reshard(stage_shard: StageShard) -> None:
    """Put the parameters in pieces, which an optimizer updates, in the place of gathered copies."""
    for module in stage_shard.groups:
        module.reshard()
    _forget_forwards(stage_shard)


def _forget_forwards(stage_shard: StageShard) -> None:
    """Drop FSDP's list of the forwards that were made. It guesses from it what to gather ahead, which `_prefetch` says, and
    clears it in a backward, which frozen units and evaluation never have."""
    getattr(stage_shard.root._get_fsdp_state()._comm_ctx, "post_forward_order", []).clear()  # type: ignore[operator]
    for module in stage_shard.groups:
        for group in _parameter_groups(module):
            group._post_forward_indices.clear()


def reset(stage_shard: StageShard, device: torch.device) -> None:
    """Bring FSDP back to where it is between two steps, behind an exception in a forward or a backward: parameters are in
    pieces, and gradients that were not yet summed over dp are lost."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)  # what was under way in other streams
    for module in stage_shard.groups:
        state = module._get_fsdp_state()
        state._training_state = TrainingState.IDLE
        getattr(state, "_modules_to_run_forward", set()).clear()
        for group in _parameter_groups(module):
            work = group._all_gather_result and group._all_gather_result.all_gather_work
            if isinstance(work, dist.Work):
                with contextlib.suppress(RuntimeError):  # the exception at hand is the one to tell of
                    work.wait()
            group._all_gather_result = group._post_reduce_event = group._all_reduce_state = None
            group._reshard_after_forward_event = group._partial_reduce_output = None
            group._training_state = TrainingState.IDLE
            for each in group.fsdp_params:
                each.unsharded_accumulated_grad = None
                if hasattr(each, "_unsharded_param"):
                    each._unsharded_param.grad = None
            group._to_sharded()
    root = stage_shard.root._get_fsdp_state()  # type: ignore[operator]
    root._state_ctx.iter_forward_root = None
    root._state_ctx.post_backward_final_callback_queued = False
    for name in ("all_gather_state", "reduce_scatter_state"):  # the second is a list from torch 2.13 on
        if hasattr(root._comm_ctx, name):
            setattr(root._comm_ctx, name, None)
    for name in ("reduce_scatter_states", "_last_post_reduce_events"):
        getattr(root._comm_ctx, name, []).clear()
    _forget_forwards(stage_shard)


def _parameter_groups(module: Any) -> list[Any]:
    """The groups of a module's parameters: one in torch 2.11, several in later ones."""
    state = module._get_fsdp_state()
    return getattr(state, "_fsdp_param_groups", None) or [group for group in [state._fsdp_param_group] if group]


def iter_tensors(stage_shard: StageShard) -> Iterator[tuple[str, Tensor, bool]]:
    """What FSDP holds of a stage: role, this rank's tensor, and whether its unit is one that the host keeps."""
    for module in stage_shard.groups:
        state = module._get_fsdp_state()
        on_host = stage_shard.offloads(module)
        results = [state._comm_ctx.all_gather_state and state._comm_ctx.all_gather_state.all_gather_result]
        for group in _parameter_groups(module):
            results.append(group._all_gather_result)
            for each in group.fsdp_params:
                yield "parameters", each.sharded_param, on_host
                yield from (("gathered", held, False) for held in each.all_gather_outputs)
                copy = getattr(each, "_unsharded_param", None)
                unreduced = (each.unsharded_accumulated_grad, None if copy is None else copy.grad)
                yield from (("unreduced", held, False) for held in unreduced if held is not None)
                if each.sharded_param.grad is not None:
                    yield "gradients", each.sharded_param.grad, on_host
        yield from (("gathered", result.all_gather_output, False) for result in results if result)
    for scalar in stage_shard.scalars:
        yield "parameters", scalar, False
        if scalar.grad is not None:
            yield "gradients", scalar.grad, False


def run_post_backward(stage_shard: StageShard) -> None:
    """Give FSDP the gradients of weights that came without a backward of its own: as behind a backward, it adds them to those
    in the masters' dtype, and sums these over dp where it is to."""
    stage_shard.root._get_fsdp_state()._root_post_backward_final_callback()  # type: ignore[operator]


class MainGrad:
    """The gradient of a weight over the micro-batches that FSDP does not yet sum over dp, in the masters' dtype. Left to FSDP,
    each of them is rounded to the compute dtype, and read again to be added. What Megatron-LM calls main_grad."""

    def __init__(self, group: Any, parameter: Any) -> None:
        self._group, self._parameter = group, parameter

    @property
    def weight(self) -> Tensor:
        """The parameter that is gathered, to which gradients belong."""
        held: Tensor = self._parameter.unsharded_param
        return held

    def add(self, of_results: Tensor, x: Tensor) -> Tensor | None:
        """Add the gradient of this micro-batch, `of_results`ᵀ x: [out, in] of [rows, out] and [rows, in]. Where FSDP sums it
        over dp at once, nothing is added, and it is returned, in their dtype, for `weight`."""
        held = self._parameter.unsharded_accumulated_grad
        if held is not None:
            add_product(held.to_local() if isinstance(held, DTensor) else held, of_results.t(), x)
            return None
        if self._group.reduce_grads:
            return self._laid_out(of_results.t() @ x)
        self._parameter.unsharded_accumulated_grad = self._laid_out(product(of_results.t(), x, self._parameter.reduce_dtype))
        return None

    def _laid_out(self, gradient: Tensor) -> Tensor:
        weight = self.weight
        if not isinstance(weight, DTensor):
            return gradient
        return DTensor.from_local(
            gradient, weight.device_mesh, weight.placements, run_check=False, shape=weight.shape, stride=weight.stride()
        )


def accumulate_in_main_grads(stage_shard: StageShard) -> None:
    """Called once, where gradients are reduced in a wider dtype than they are computed in: the matrices of a unit learn where
    those of several micro-batches are added up. Not under a split backward, whose halves are told apart by what autograd gives
    to weights."""
    found: dict[tuple[int, str], MainGrad] = {}
    for module in stage_shard.groups:
        for group in _parameter_groups(module):
            for each in group.fsdp_params:
                info = each._module_info
                users = [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]
                if each.sharded_param.dim() == 2:
                    found.update({(id(user._parameters), name): MainGrad(group, each) for user, name in users})
    for home in stage_shard.unit_parameters:
        places = {name: (id(module._parameters), attribute) for name, (module, attribute) in home.places.items()}
        home.main_grads = {} if home.splits else {name: found[at] for name, at in places.items() if at in found}
