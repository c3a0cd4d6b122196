"""The variants: HuggingFace as it is, compiled, or patched by Liger-Kernel; FSDP2; and shardcomp.

All train on one rank, with products in bf16, float32 masters, AdamW, and gradients clipped to a norm of 1. Also where the time
of a step goes.
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
    """What a variant needs is not there; its text says what."""


@dataclass
class Trainer:
    """One way to train. gradients: forward and backward of a batch [sequences, seq], returns the mean loss, []. update: one
    optimizer step, which leaves no gradients behind. attention: what computes it."""

    gradients: Callable[[Tensor], Tensor]
    update: Callable[[], None]
    parameters: int
    attention: str


def trainer(variant: str, shape: Shape, setting: Setting, device: torch.device) -> Trainer:
    """Make a model with random weights and what trains it. Raises Absent, and what the variant itself raises."""
    if variant.startswith("shardcomp"):
        return _shardcomp(shape, setting, device, compiled=variant.endswith("compile"))
    if variant == "fsdp2":
        return _fsdp2(shape, setting, device)
    return _huggingface(variant, shape, setting, device)


def drawn(shape: tuple[int, ...] | torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Initial weights: ones for what scales, small random numbers for the rest, the same in every dtype but for rounding."""
    tensor = torch.empty(shape, device=device)
    return (tensor.fill_(1) if len(shape) < 2 else tensor.normal_(0, 0.02)).to(dtype)


def dense(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """HuggingFace's model, built on the device."""
    model = presets.build(shape.config(), dtype)
    drawn_params: dict[nn.Parameter, nn.Parameter] = {}  # a tied weight stays one
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                drawn_params[param] = drawn_params.get(param) or nn.Parameter(drawn(param.shape, device, dtype))
                module._parameters[name] = drawn_params[param]
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)
    return model.train()


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers."""
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


class MasterAdamW:
    """AdamW on float32 masters of weights in bf16, with torch's fused kernel: one group of parameters after the other, so that
    gradients in float32 are there for one group at a time."""

    def __init__(self, groups: list[list[nn.Parameter]]) -> None:
        self.groups = []
        for weights in groups:
            masters = [nn.Parameter(weight.detach().float()) for weight in weights]
            self.groups.append((weights, masters, torch.optim.AdamW(masters, fused=True, **ADAMW)))

    @torch.no_grad()
    def step(self) -> None:
        """Update, and round the masters into the weights."""
        for weights, masters, optimizer in self.groups:
            for weight, master in zip(weights, masters, strict=True):
                master.grad = None if weight.grad is None else weight.grad.float()
            optimizer.step()
            torch._foreach_copy_(weights, masters)
            for weight, master in zip(weights, masters, strict=True):
                weight.grad = master.grad = None


def _mean_loss(model: nn.Module, setting: Setting) -> Callable[[Tensor], Tensor]:
    """Forward and backward of a HuggingFace model, in micro-batches."""

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
    """What compiles: on the CPU, where only the way there is tried, nothing is generated."""
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
    inside = {p for layer in layers for p in layer.parameters()}
    rest = [[p] for p in model.parameters() if p not in inside]
    optimizer = MasterAdamW([*rest, *(list(layer.parameters()) for layer in layers)])

    def update() -> None:
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM, foreach=True)
        optimizer.step()

    return Trainer(_mean_loss(model, setting), update, _count(model), model.config._attn_implementation)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _one_rank(device: torch.device) -> None:
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
    for part in (*layers_of(model), model):
        fully_shard(part, mesh=mesh, mp_policy=policy, reshard_after_forward=not setting.gathered)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, fused=True, **ADAMW)

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, MAX_NORM, foreach=True)
        optimizer.step()
        optimizer.zero_grad()

    return Trainer(_mean_loss(model, setting), update, _count(model), model.config._attn_implementation)


def _shardcomp(shape: Shape, setting: Setting, device: torch.device, compiled: bool) -> Trainer:
    asked: dict[str, Any] = {
        "micro_batch": setting.micro_batch,
        "recompute": setting.recompute,
        "zero": 0 if setting.gathered else 3,
    }
    if compiled:
        asked["compile"] = True
        unit.BACKEND = _backend(device)
    _one_rank(device)
    policy = shardcomp.Policy.load("llama", **asked)
    lowered = lower(presets.build(shape.config()), policy, 1, seq=shape.seq, micro_batch=setting.micro_batch)

    def weights(name: str, index: tuple[slice, ...]) -> Tensor:
        return drawn(torch.Size(slice_.stop - slice_.start for slice_ in index), device, torch.float32)

    sharded = allocate(lowered, weights)
    optimizer = shardcomp.AdamW(sharded.parameters(), **ADAMW)

    def update() -> None:
        sharded.optimizer_step(optimizer, max_norm=MAX_NORM)
        optimizer.zero_grad()

    count = sum(p.numel() for p in sharded.parameters())
    return Trainer(lambda tokens: sharded.train_step(input_ids=tokens, labels=tokens).loss, update, count, "auto")


KINDS = (
    ("communication", r"nccl|all_?gather|reduce_?scatter|all_?reduce|split_with_sizes|chunk_cat|c10d"),
    ("attention", r"flash|fmha|attention|sdpa|mha_|attn"),
    ("matmul", r"gemm|cutlass|cublas|nvjet|xmma|splitk|::mm\b|::addmm|::bmm|::linear\b|::matmul|::_?scaled_mm"),
    ("loss", r"cross_entropy|nll_loss|log_?softmax|soft_?max"),
    ("norms", r"norm|rsqrt"),
)
"""Kind -> what the names of its kernels have in them; the first that fits counts. What is left over is elementwise."""


def kind(name: str) -> str:
    """What a kernel of this name does."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "elementwise")


LONGEST = 40
"""Kernels that are told by name."""


def where(run: Trainer, tokens: Tensor, device: torch.device) -> dict[str, Any]:
    """Where the time of one step goes. time: kind of kernels -> seconds; `optimizer` is all of an update, with the norm of the
    gradients. longest: the kernels that take longest, each with its seconds and how often it runs."""
    time: defaultdict[str, float] = defaultdict(float)
    named: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for call, of_all in ((lambda: run.gradients(tokens), None), (run.update, "optimizer")):
        for name, seconds in _seen(call, device):
            time[of_all or kind(name)] += seconds
            named[name][0] += seconds
            named[name][1] += 1
    longest = sorted(named.items(), key=lambda entry: -entry[1][0])[:LONGEST]
    return {"time": dict(time), "longest": [[name[:200], *total] for name, total in longest]}


def _seen(call: Callable[[], Any], device: torch.device) -> list[tuple[str, float]]:
    """The kernels that a call runs, or on the CPU its operators, with their own seconds."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as seen:
        call()
        if on_gpu:
            torch.cuda.synchronize(device)
    events: Any = seen.events()
    if not on_gpu:
        return [(event.name, event.self_cpu_time_total / 1e6) for event in events]
    return [
        (event.name, event.time_range.elapsed_us() / 1e6)
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA and not _is_annotation(event)
    ]


def _is_annotation(event: Any) -> bool:
    """Whether an event is a region that a program has named, which holds kernels and is none."""
    return bool(getattr(event, "is_user_annotation", False)) or event.name.startswith(
        ("FSDP::", "## ", "ProfilerStep", "Torch-")
    )
