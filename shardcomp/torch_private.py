"""Every private name of torch that shardcomp uses, outside of `runtime/fsdp.py`, which has FSDP2's.

Each was seen in torch 2.11 and 2.13, unless its line says otherwise. A release that moves or drops one is caught by
`tests/test_torch_private.py`, and mended here. Names are imported on first use: some are in modules that load slowly.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

SEEN_IN = ("2.11", "2.13")

_NAMES = {  # name -> "module:name there", or "module:" for the module itself
    # Fake tensors and modes: shapes without numbers.
    "FakeTensor": "torch._subclasses.fake_tensor:FakeTensor",
    "FakeTensorMode": "torch._subclasses.fake_tensor:FakeTensorMode",
    "TorchDispatchMode": "torch.utils._python_dispatch:TorchDispatchMode",
    "disable_current_modes": "torch.utils._python_dispatch:_disable_current_modes",
    "DisableTorchFunction": "torch._C:DisableTorchFunction",
    "disabled_torch_function": "torch._C:_disabled_torch_function_impl",
    "dispatch_modes": "torch._C:_len_torch_dispatch_stack",
    "function_modes": "torch._C:_len_torch_function_stack",
    "tree_leaves": "torch.utils._pytree:tree_leaves",
    "tree_map": "torch.utils._pytree:tree_map",
    "tree_map_only": "torch.utils._pytree:tree_map_only",
    # Capture.
    "HigherOrderOperator": "torch._ops:HigherOrderOperator",
    "OpOverload": "torch._ops:OpOverload",
    "size_functions": "torch.utils._sympy.functions:",
    "TransformGetItemToIndex": "torch._dynamo._trace_wrapped_higher_order_op:TransformGetItemToIndex",
    # Modules.
    "DropoutNd": "torch.nn.modules.dropout:_DropoutNd",
    # Operators.
    "cpu_multiplies_bf16": "torch:ops.mkldnn._is_mkldnn_bf16_supported",
    "dispatch_has_kernel": "torch._C:_dispatch_has_kernel_for_dispatch_key",
    "assert_async": "torch:_assert_async",
    "foreach_mul_": "torch:_foreach_mul_",
    "foreach_norm": "torch:_foreach_norm",
    "safe_softmax": "torch:ops.aten._safe_softmax",
    "flash_attention": "torch:ops.aten._scaled_dot_product_flash_attention",
    "flash_attention_on_cpu": "torch:ops.aten._scaled_dot_product_flash_attention_for_cpu",
    # Autograd.
    "current_graph_task": "torch._C:_current_graph_task_id",
    # Distributed.
    "StridedShard": "torch.distributed.tensor.placement_types:_StridedShard",
    "replicate": "torch.distributed._composable.replicate_with_fsdp:replicate",
    "grad_node_of": "torch.distributed.pipelining._backward:_get_grad_fn_or_grad_acc",
    "stage_backward": "torch.distributed.pipelining._backward:stage_backward",
    "stage_backward_input": "torch.distributed.pipelining._backward:stage_backward_input",
    "distributed_c10d": "torch._C:_distributed_c10d",
    "default_store": "torch.distributed.distributed_c10d:_get_default_store",
    "multi_threaded_pg": "torch.testing._internal.distributed.multi_threaded_pg:",
}

NO_GRAPH_TASK = -1
"""`current_graph_task()` outside of a backward. Inside, the number of the backward."""


def __getattr__(name: str) -> Any:
    """Import a name on first use."""
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _NAMES[name].partition(":")
    value = importlib.import_module(module)
    if attribute:
        value = attrgetter(attribute)(value)
    globals()[name] = value
    return value


def queue_callback(callback: Callable[[], Any]) -> None:
    """Run `callback` at the end of the backward that runs now, after callbacks that were queued before it."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # type: ignore[attr-defined]


def run_backward(edges: Sequence[GradientEdge], gradients: Sequence[Tensor], ends: Sequence[GradientEdge]) -> Any:
    """The gradients that arrive at `ends` from a backward that starts at `edges`. The graph is freed."""
    from torch.autograd.graph import _engine_run_backward

    retain_graph = create_graph = allow_unused = False
    return _engine_run_backward(edges, gradients, retain_graph, create_graph, ends, allow_unused, accumulate_grad=False)


def skip_metadata_inference(schedule: Any) -> None:
    """Keep a pipeline schedule from running the model once to learn shapes, which also drops accumulated gradients."""
    schedule._initialize_stage = schedule._initialize_stages = lambda *args, **kwargs: None


def storage_id(tensor: Tensor) -> int:
    """The same number for all tensors that share memory. Unlike `data_ptr`, also for tensors on meta."""
    return int(tensor.untyped_storage()._cdata)
