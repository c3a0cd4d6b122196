"""The variants of the benchmark: HuggingFace unmodified, compiled or patched by Liger-Kernel; FSDP2; and shardcomp.

Each trains on one rank, with matrix products in bf16, float32 masters, AdamW, and gradients clipped to a norm of 1.
`time_shares` measures how long each kind of kernel takes in a step.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import shardcomp
from arithmetic import Setting, Shape
from shardcomp import presets
from shardcomp.lowering import lower
from shardcomp.materialize import allocate
from shardcomp.runtime import unit

ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1}
MAX_NORM = 1.0


class Absent(Exception):
    """A variant needs a package that is not installed. The message names it."""


@dataclass
class Trainer:
    """A model and what trains it.

    gradients: runs forward and backward of a batch, `int64[sequences, seq]`, and returns the mean loss, a scalar. update: runs
    an optimizer step, and then drops the gradients. parameters: how many numbers are trained. attention: its implementation.
    """

    gradients: Callable[[Tensor], Tensor]
    update: Callable[[], None]
    parameters: int
    attention: str


def trainer(variant: str, shape: Shape, setting: Setting, device: torch.device) -> Trainer:
    """Build a variant with random weights. Raises Absent, and whatever the variant itself raises."""
    if variant.startswith("shardcomp"):
        return _shardcomp(shape, setting, device, compiled=variant.endswith("compile"))
    if variant == "fsdp2":
        return _fsdp2(shape, setting, device)
    return _huggingface(variant, shape, setting, device)


def random_weight(shape: tuple[int, ...] | torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """An initial weight: ones for a norm's vector, small random numbers for a matrix. All dtypes round the same numbers."""
    tensor = torch.empty(shape, device=device)
    return (tensor.fill_(1) if len(shape) < 2 else tensor.normal_(0, 0.02)).to(dtype)


def dense(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """HuggingFace's model with random weights, built on the device."""
    model = presets.build(shape.config(), dtype)
    real_params: dict[nn.Parameter, nn.Parameter] = {}  # by the meta parameter, so that a tied weight stays one parameter
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                if param not in real_params:
                    real_params[param] = nn.Parameter(random_weight(param.shape, device, dtype))
                module._parameters[name] = real_params[param]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model.train()


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers: the longest list of modules."""
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


class MasterAdamW:
    """AdamW on float32 masters of bf16 weights, with torch's fused kernel.

    It updates one group of parameters after the other, so that only one group at a time has float32 gradients.
    """

    def __init__(self, groups: list[list[nn.Parameter]]) -> None:
        self.groups = []
        for weights in groups:
            masters = [nn.Parameter(weight.detach().float()) for weight in weights]
            self.groups.append((weights, masters, torch.optim.AdamW(masters, fused=True, **ADAMW)))

    @torch.no_grad()
    def step(self) -> None:
        """Update the masters, round them into the weights, and drop the gradients."""
        for weights, masters, optimizer in self.groups:
            for weight, master in zip(weights, masters, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
            optimizer.step()
            torch._foreach_copy_(weights, masters)
            for weight, master in zip(weights, masters, strict=True):
                weight.grad = master.grad = None


def _gradients(model: nn.Module, setting: Setting) -> Callable[[Tensor], Tensor]:
    """`Trainer.gradients` of a HuggingFace model: forward and backward of one micro-batch after the other."""

    def gradients(tokens: Tensor) -> Tensor:
        micro_batches, losses = tokens.split(setting.micro_batch), []
        for micro_batch in micro_batches:
            loss = model(input_ids=micro_batch, labels=micro_batch, use_cache=False).loss / len(micro_batches)
            loss.backward()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    return gradients


def _recompute(model: Any, setting: Setting) -> None:
    if setting.recompute == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _backend(device: torch.device) -> str:
    """The backend of torch.compile. On the CPU nothing is measured, so no code is generated there."""
    return "inductor" if device.type == "cuda" else "aot_eager"


def _huggingface(variant: str, shape: Shape, setting: Setting, device: torch.device) -> Trainer:
    if variant == "hf-liger":
        try:
            from liger_kernel.transformers import apply_liger_kernel_to_llama
        except ImportError as error:
            raise Absent(f"Liger-Kernel is not installed ({error})") from error
        apply_liger_kernel_to_llama()
    model = dense(shape, device, torch.bfloat16)
    _recompute(model, setting)
    layers = layers_of(model)
    if variant == "hf-compile":
        for layer in layers:
            layer.compile(backend=_backend(device), dynamic=False)
        model.loss_function = torch.compile(model.loss_function, backend=_backend(device), dynamic=False)
    of_layers = {param for layer in layers for param in layer.parameters()}
    others = [[param] for param in model.parameters() if param not in of_layers]
    optimizer = MasterAdamW([*others, *(list(layer.parameters()) for layer in layers)])

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, foreach=True)
        optimizer.step()

    return Trainer(_gradients(model, setting), update, _count(model), model.config._attn_implementation)


def _count(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def _one_rank(device: torch.device) -> None:
    """Make this process the only rank of a process group, unless it has one."""
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _fsdp2(shape: Shape, setting: Setting, device: torch.device) -> Trainer:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    _one_rank(device)
    model = dense(shape, device, torch.float32)
    _recompute(model, setting)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (1,))
    for module in (*layers_of(model), model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=not setting.gathered)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True, **ADAMW)

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return Trainer(_gradients(model, setting), update, _count(model), model.config._attn_implementation)


def _shardcomp(shape: Shape, setting: Setting, device: torch.device, compiled: bool) -> Trainer:
    options: dict[str, Any] = {
        "micro_batch": setting.micro_batch,
        "recompute": setting.recompute,
        "zero": 0 if setting.gathered else 3,
    }
    if compiled:
        options["compile"] = True
        unit.BACKEND = _backend(device)
    _one_rank(device)
    policy = shardcomp.Policy.load("llama", **options)
    lowered = lower(presets.build(shape.config()), policy, 1, seq=shape.seq, micro_batch=setting.micro_batch)

    def weights(name: str, index: tuple[slice, ...]) -> Tensor:
        return random_weight(torch.Size(slice_.stop - slice_.start for slice_ in index), device, torch.float32)

    sharded = allocate(lowered, weights)
    optimizer = shardcomp.AdamW(sharded.parameters(), **ADAMW)

    def update() -> None:
        sharded.optimizer_step(optimizer, max_norm=MAX_NORM)
        optimizer.zero_grad()

    def gradients(tokens: Tensor) -> Tensor:
        return sharded.train_step(input_ids=tokens, labels=tokens).loss

    return Trainer(gradients, update, _count(sharded), "auto")


KINDS = (
    ("communication", r"nccl|all_?gather|reduce_?scatter|all_?reduce|split_with_sizes|chunk_cat|c10d"),
    ("attention", r"flash|fmha|attention|sdpa|mha_|attn"),
    ("matmul", r"gemm|cutlass|cublas|nvjet|xmma|splitk|::mm\b|::addmm|::bmm|::linear\b|::matmul|::_?scaled_mm"),
    ("loss", r"cross_entropy|nll_loss|log_?softmax|soft_?max"),
    ("norms", r"norm|rsqrt"),
)
"""(kind, a pattern in the names of its kernels). The first that matches counts. A kernel that matches none is elementwise."""


def kind(name: str) -> str:
    """The kind of the kernel with this name: a kind of KINDS, or elementwise."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "elementwise")


LONGEST = 40
"""How many kernels are reported by name."""


def time_shares(run: Trainer, tokens: Tensor, device: torch.device) -> dict[str, Any]:
    """Profile one step.

    Returns:
        `time`: kind of kernel -> seconds. The kind `optimizer` is the whole update, the norm of the gradients included.
        `longest`: [name, seconds, number of calls] of the kernels that take longest.
    """
    seconds_by_kind: defaultdict[str, float] = defaultdict(float)
    totals: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for call, only_kind in ((lambda: run.gradients(tokens), None), (run.update, "optimizer")):
        for name, seconds in _profiled(call, device):
            seconds_by_kind[only_kind or kind(name)] += seconds
            totals[name][0] += seconds
            totals[name][1] += 1
    longest = sorted(totals.items(), key=lambda entry: -entry[1][0])[:LONGEST]
    return {"time": dict(seconds_by_kind), "longest": [[name[:200], *total] for name, total in longest]}


def _profiled(call: Callable[[], Any], device: torch.device) -> list[tuple[str, float]]:
    """(name, seconds) of every kernel that a call runs. On the CPU: of every operator, without the operators inside it."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiled:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    events: Any = profiled.events()
    if not on_gpu:
        return [(event.name, event.self_cpu_time_total / 1e6) for event in events]
    return [
        (event.name, event.time_range.elapsed_us() / 1e6)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and not _is_annotation(event)
    ]


def _is_annotation(event: Any) -> bool:
    """Whether an event is a named region of a program. Such a region contains kernels, and is not a kernel itself."""
    return bool(getattr(event, "is_user_annotation", False)) or event.name.startswith(
        ("FSDP::", "## ", "ProfilerStep", "Torch-")
    )
