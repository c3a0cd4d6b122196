"""What FSDP2 does around the units of a stage, step by step. Only this file imports its private modules.

FSDP2 gathers a unit's parameters before its forward and its backward, and afterwards reshards them and reduce-scatters their
gradients. A schedule with several micro-batches under way needs to decide when: that is set here. `main_grad.py` too reads
FSDP's objects, of each weight that `matrices` finds. Each private name was seen in torch 2.11 and 2.13; where the two differ,
the code takes either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param import ShardedState

from shardcomp.errors import InternalError, PlanError
from shardcomp.runtime.stage_shard import StageShard


def prepare_backward(stage_shard: StageShard, reduce: bool, last: bool) -> None:
    """Set what FSDP does in the next backward.

    reduce: whether it reduces gradients over dp. last: whether this is the last backward of a step, after which every group is
    resharded; before it, only the groups whose plan says so.
    """
    stage_shard.root.set_requires_gradient_sync(reduce)  # type: ignore[operator]
    for module in stage_shard.groups:
        module.set_reshard_after_backward(last or stage_shard.reshards(module), recurse=False)
        for group in _param_groups(module):
            group.reduce_grads = reduce and not _skips_reduction(group)


def _skips_reduction(group: Any) -> bool:
    """Whether a group has nothing to reduce over. FSDP would still copy its gradients three times, so
    `finish_unreduced_grads` finishes them instead. Groups on the host are left to FSDP, which copies gradients there."""
    return bool(group.mesh_info.mesh.size() == 1) and not any(param.offload_to_cpu for param in group.fsdp_params)


@torch.no_grad()
def finish_unreduced_grads(stage_shard: StageShard) -> None:
    """Give the sharded parameters the gradients that FSDP did not reduce, or add them to existing gradients. Called after
    the last backward of a step."""
    for group in (group for module in stage_shard.groups for group in _param_groups(module) if _skips_reduction(group)):
        for param in group.fsdp_params:
            if not hasattr(param, "_unsharded_param"):  # its unit has not run
                continue
            gathered, sharded = param.unsharded_param, param.sharded_param
            if param.unsharded_accumulated_grad is not None:
                gradient = param.unsharded_accumulated_grad_data
            elif gathered.grad is not None:
                gradient = param.unsharded_grad_data
            else:
                continue
            param.unsharded_accumulated_grad = gathered.grad = None
            if sharded.grad is None:
                sharded.grad = param.to_sharded_dtensor(gradient.to(param.orig_dtype))
            else:
                sharded.grad.to_local().add_(gradient)


def sharded_parameters(stage_shard: StageShard) -> Iterator[Any]:
    """The parameters that an optimizer updates, also while gathered copies are in their place."""
    for module in stage_shard.groups:
        for group in _param_groups(module):
            yield from (param.sharded_param for param in group.fsdp_params)
    yield from stage_shard.scalars


class _Scalar:
    """A 0-d parameter, which FSDP does not take, with the one attribute of FSDPParam that readers need."""

    def __init__(self, module: nn.Module, leaf: str) -> None:
        self._module, self._leaf = module, leaf

    @property
    def sharded_param(self) -> Any:
        return self._module._parameters[self._leaf]


def named_parameters(stage_shard: StageShard) -> list[tuple[str, Any]]:
    """(name in the model, entry) of each parameter of a stage. `entry.sharded_param` is what an optimizer updates, also while
    a gathered copy is in its place."""
    entries = {}
    for module in stage_shard.groups:
        for group in _param_groups(module):
            entries.update({_name_of(stage_shard, param._module_info): param for param in group.fsdp_params})
    for module, leaf in stage_shard.scalar_places:
        entries[_name_at(stage_shard, module, leaf)] = _Scalar(module, leaf)
    return list(entries.items())


def matrices(stage_shard: StageShard) -> Iterator[tuple[Any, Any, Sequence[tuple[nn.Module, str]]]]:
    """FSDP's group and parameter of each two-dimensional parameter, and all (module, attribute) places that share it."""
    for module in stage_shard.groups:
        for group in _param_groups(module):
            for param in group.fsdp_params:
                info = param._module_info
                if param.sharded_param.dim() == 2:
                    shared = zip(info.shared_modules, info.shared_param_names, strict=True)
                    yield group, param, [(info.module, info.param_name), *shared]


def check_not_replaced(stage_shard: StageShard) -> None:
    """Raise PlanError where a parameter that FSDP knows was replaced by another tensor, as `torch.func.functional_call` does:
    the new one would be listed, and the old one used."""
    for module in stage_shard.groups:
        for param in (param for group in _param_groups(module) for param in group.fsdp_params):
            info, is_sharded = param._module_info, param.sharded_state == ShardedState.SHARDED
            current = info.module._parameters[info.param_name]
            if current is not (param.sharded_param if is_sharded else param._unsharded_param):
                raise PlanError(
                    f"{_name_of(stage_shard, info)} of the sharded model was replaced by another tensor, which its code would "
                    "not use: copy numbers into it, under torch.no_grad(): parameter.copy_(...), or load_state_dict(...)"
                )


def _name_of(stage_shard: StageShard, info: Any) -> str:
    return _name_at(stage_shard, info.module, info.param_name)


def _name_at(stage_shard: StageShard, holder: nn.Module, attribute: str) -> str:
    """The name in the model of the parameter that a module of this rank has."""
    at = id(holder._parameters), attribute
    for unit_params, unit in zip(stage_shard.unit_parameters, stage_shard.units, strict=True):
        for short, (module, leaf) in unit_params.places.items():
            if (id(module._parameters), leaf) == at:
                return unit.parameters[short]
    raise InternalError(f"no unit has the parameter {attribute}")


def use_separate_gather_buffers(stage_shard: StageShard) -> None:
    """Free the buffer of each gather as soon as its parameters are copied out. Called once.

    FSDP otherwise keeps the buffer of the unit that computes while the next unit is gathered, which needs memory for three
    units at once. Only groups that are resharded after forward are concerned.
    """
    for module in stage_shard.groups:
        if stage_shard.reshards(module):
            module._set_unshard_async_op(True)


def reshard(stage_shard: StageShard) -> None:
    """Put the sharded parameters, which an optimizer updates, back in the place of gathered copies."""
    for module in stage_shard.groups:
        module.reshard()
    _forget_forwards(stage_shard)


def _forget_forwards(stage_shard: StageShard) -> None:
    """Clear FSDP's record of past forwards.

    FSDP guesses from it what to prefetch, which `allocation._prefetch` sets explicitly. FSDP itself clears it in a backward,
    which frozen units and evaluation never have: it would grow for ever.
    """
    getattr(stage_shard.root._get_fsdp_state()._comm_ctx, "post_forward_order", []).clear()  # type: ignore[operator]
    for module in stage_shard.groups:
        for group in _param_groups(module):
            group._post_forward_indices.clear()


def reset(stage_shard: StageShard, device: torch.device) -> None:
    """Bring FSDP back to its state between two steps, after an exception in a forward or backward: parameters are sharded, and
    gradients that were not yet reduced are lost."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)  # other streams may still use what is freed below
    for module in stage_shard.groups:
        state = module._get_fsdp_state()
        state._training_state = TrainingState.IDLE
        getattr(state, "_modules_to_run_forward", set()).clear()
        for group in _param_groups(module):
            work = group._all_gather_result and group._all_gather_result.all_gather_work
            if isinstance(work, dist.Work):
                with contextlib.suppress(RuntimeError):  # the caller reports the first exception, not this one
                    work.wait()
            group._all_gather_result = group._post_reduce_event = group._all_reduce_state = None
            group._reshard_after_forward_event = group._partial_reduce_output = None
            group._training_state = TrainingState.IDLE
            for param in group.fsdp_params:
                param.unsharded_accumulated_grad = None
                if hasattr(param, "_unsharded_param"):
                    param._unsharded_param.grad = None
            group._to_sharded()
    # The root keeps what all groups share: which forward is the outermost, and whether a last callback is queued.
    root = stage_shard.root._get_fsdp_state()  # type: ignore[operator]
    root._state_ctx.iter_forward_root = None
    root._state_ctx.post_backward_final_callback_queued = False
    for name in ("all_gather_state", "reduce_scatter_state"):  # the second is a list from torch 2.13 on
        if hasattr(root._comm_ctx, name):
            setattr(root._comm_ctx, name, None)
    for name in ("reduce_scatter_states", "_last_post_reduce_events"):
        getattr(root._comm_ctx, name, []).clear()
    _forget_forwards(stage_shard)


def _param_groups(module: Any) -> list[Any]:
    """The groups of a module's parameters: one in torch 2.11, several in later releases."""
    state = module._get_fsdp_state()
    return getattr(state, "_fsdp_param_groups", None) or [group for group in [state._fsdp_param_group] if group]


def iter_tensors(stage_shard: StageShard) -> Iterator[tuple[str, Tensor, bool]]:
    """(role, this rank's tensor, whether its unit is offloaded) of all that FSDP keeps of a stage. The roles are those of
    `memory_by_role`."""
    for module in stage_shard.groups:
        state = module._get_fsdp_state()
        on_host = stage_shard.offloads(module)
        results = [state._comm_ctx.all_gather_state and state._comm_ctx.all_gather_state.all_gather_result]
        for group in _param_groups(module):
            results.append(group._all_gather_result)
            for param in group.fsdp_params:
                yield "parameters", param.sharded_param, on_host
                yield from (("gathered", tensor, False) for tensor in param.all_gather_outputs)
                gathered = getattr(param, "_unsharded_param", None)
                unreduced = (param.unsharded_accumulated_grad, None if gathered is None else gathered.grad)
                yield from (("unreduced", gradient, False) for gradient in unreduced if gradient is not None)
                if param.sharded_param.grad is not None:
                    yield "gradients", param.sharded_param.grad, on_host
        yield from (("gathered", result.all_gather_output, False) for result in results if result)
    for scalar in stage_shard.scalars:
        yield "parameters", scalar, False
        if scalar.grad is not None:
            yield "gradients", scalar.grad, False


def run_post_backward(stage_shard: StageShard) -> None:
    """Run FSDP's last callback of a backward, after a weight pass that FSDP did not see: it accumulates the gradients in the
    masters' dtype, and reduces them over dp where `prepare_backward` asked for that."""
    stage_shard.root._get_fsdp_state()._root_post_backward_final_callback()  # type: ignore[operator]
