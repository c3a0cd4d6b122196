"""The contenders of `compare.py`: one function each, which makes a model trainable on the ranks of a topology.

Every contender starts from the numbers of `shardcomp.initialize`, sees the same tokens, and steps with AdamW. In bf16 all of
them keep float32 parameters and compute in bf16: by autocast, by FSDP2's mixed precision, or by the policy of shardcomp. A
library that is not installed raises `Absent`, and the table says so.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

LEARNING_RATE = 1e-3


class Absent(Exception):
    """What a contender needs is not here; the text says what."""


@dataclass(frozen=True)
class Workload:
    """A LLaMA and a training step of it.

    sequences: of one optimizer step, over all ranks, of `seq` tokens each. micro_batches: into which a data-parallel rank cuts
    its sequences. precision: "bf16" or "fp32". device: "cpu" or "cuda".
    """

    hidden: int
    layers: int
    heads: int
    vocab: int
    seq: int
    sequences: int
    micro_batches: int
    precision: str
    device: str

    def config(self) -> Any:
        """The HuggingFace configuration."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=-(-self.hidden * 8 // 3 // 16) * 16,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 2,
            max_position_embeddings=self.seq,
            tie_word_embeddings=False,
            use_cache=False,
        )

    def batch(self, step: int) -> Tensor:
        """The tokens of a step: [sequences, seq] int64. Few distinct ones, so that a loss curve falls."""
        draw = torch.Generator().manual_seed(step)
        return torch.randint(0, min(self.vocab, 256), (self.sequences, self.seq), generator=draw).to(self.device)


@dataclass
class Trainer:
    """What trains. step: one optimizer step on this rank's tokens, returns its mean loss, []. data_ranks: by how many ranks the
    sequences of a step are shared."""

    step: Callable[[Tensor], Tensor]
    data_ranks: int = 1


@dataclass(frozen=True)
class Contender:
    """A row of the table. topology: the group of rows that it is compared in, and its number of ranks."""

    name: str
    topology: str
    ranks: int
    make: Callable[[Workload], Trainer]


def dense(work: Workload) -> Any:
    """HuggingFace's model with float32 parameters, the same numbers in every process."""
    import shardcomp
    from shardcomp import presets

    model = shardcomp.initialize(presets.build(work.config(), torch.float32), 0)
    return model.to(work.device).train()


def autocast(work: Workload) -> contextlib.AbstractContextManager[Any]:
    """bf16 products over float32 parameters, where the workload asks for bf16."""
    return torch.autocast(work.device, torch.bfloat16) if work.precision == "bf16" else contextlib.nullcontext()


def adamw(parameters: Iterable[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
    """torch's AdamW, in its fastest form unless `options` say otherwise."""
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, **(options or {"fused": True}))


def plain(work: Workload, model: nn.Module, optimizer: torch.optim.Optimizer, data_ranks: int = 1) -> Trainer:
    """The loop that most people write: forward, backward, step."""

    def step(tokens: Tensor) -> Tensor:
        total = torch.zeros((), device=tokens.device)
        for index, part in enumerate(tokens.chunk(work.micro_batches)):
            with _accumulates(model, index < work.micro_batches - 1), autocast(work):
                loss = model(input_ids=part, labels=part).loss / work.micro_batches
                loss.backward()
            total += loss.detach()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return Trainer(step, data_ranks)


def _accumulates(model: Any, more: bool) -> contextlib.AbstractContextManager[Any]:
    """DDP's `no_sync` and FSDP2's switch: gradients of all but the last micro-batch stay on their rank."""
    if hasattr(model, "no_sync") and more:
        return model.no_sync()  # type: ignore[no-any-return]
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(not more)
    return contextlib.nullcontext()


# One rank -----------------------------------------------------------------------------------------------------------------


def hf_eager(work: Workload) -> Trainer:
    model = dense(work)
    return plain(work, model, adamw(model.parameters()))


def hf_compile(work: Workload) -> Trainer:
    model = dense(work)
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    model.loss_function = torch.compile(model.loss_function, dynamic=False)
    return plain(work, model, adamw(model.parameters()))


def hf_liger(work: Workload) -> Trainer:
    if work.device != "cuda":
        raise Absent("Liger-Kernel needs Triton on a GPU")
    try:
        from liger_kernel.transformers import apply_liger_kernel_to_llama
    except ImportError as error:
        raise Absent(f"Liger-Kernel is not installed ({error})") from error
    apply_liger_kernel_to_llama()
    return hf_eager(work)


def fsdp2(reshard: bool) -> Callable[[Workload], Trainer]:
    def make(work: Workload) -> Trainer:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        start(work)
        bf16 = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32} if work.precision == "bf16" else {}
        mesh = init_device_mesh(work.device, (dist.get_world_size(),))
        model = dense(work)
        for module in (*model.model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy(**bf16), reshard_after_forward=reshard)
        trainer = plain(_without_autocast(work), model, adamw(model.parameters()), dist.get_world_size())
        return trainer

    return make


def _without_autocast(work: Workload) -> Workload:
    from dataclasses import replace

    return replace(work, precision="fp32")


# Data parallel ------------------------------------------------------------------------------------------------------------


def ddp(work: Workload) -> Trainer:
    start(work)
    model = nn.parallel.DistributedDataParallel(dense(work))
    return plain(work, model, adamw(model.parameters()), dist.get_world_size())


def accelerate_ddp(work: Workload) -> Trainer:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise Absent("Accelerate is not installed") from error
    accelerator = Accelerator(
        cpu=work.device == "cpu",
        mixed_precision="bf16" if work.precision == "bf16" else "no",
        gradient_accumulation_steps=work.micro_batches,
    )
    model = dense(work)
    model, optimizer = accelerator.prepare(model, adamw(model.parameters()))

    def step(tokens: Tensor) -> Tensor:
        total = torch.zeros((), device=tokens.device)
        for part in tokens.chunk(work.micro_batches):
            with accelerator.accumulate(model):
                loss = model(input_ids=part, labels=part).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.detach() / work.micro_batches
        return total

    return Trainer(step, accelerator.num_processes)


def deepspeed_zero(stage: int) -> Callable[[Workload], Trainer]:
    def make(work: Workload) -> Trainer:
        os.environ.setdefault("DS_ACCELERATOR", work.device)
        try:
            import deepspeed
        except ImportError as error:
            raise Absent("DeepSpeed is not installed") from error
        start(work)
        ranks = dist.get_world_size()
        model = dense(work)
        settings = {
            "train_micro_batch_size_per_gpu": work.sequences // ranks // work.micro_batches,
            "gradient_accumulation_steps": work.micro_batches,
            "zero_optimization": {"stage": stage},
            "bf16": {"enabled": work.precision == "bf16"},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model.parameters()), config=settings)

        def step(tokens: Tensor) -> Tensor:
            total = torch.zeros((), device=tokens.device)
            for part in tokens.chunk(work.micro_batches):
                loss = engine(input_ids=part, labels=part).loss
                engine.backward(loss)
                engine.step()
                total += loss.detach().float() / work.micro_batches
            return total

        return Trainer(step, ranks)

    return make


# Tensor parallel ----------------------------------------------------------------------------------------------------------


def transformers_tp(work: Workload) -> Trainer:
    from transformers import AutoModelForCausalLM

    try:
        from transformers.distributed.configuration_utils import DistributedConfig
    except ImportError as error:
        raise Absent(f"this transformers has no DistributedConfig ({error})") from error
    start(work)
    ranks = dist.get_world_size()
    holder: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(holder)
    if dist.get_rank() == 0:
        dense(work).save_pretrained(holder[0])
    dist.barrier()
    split = DistributedConfig(tp_size=ranks)
    model = AutoModelForCausalLM.from_pretrained(Path(holder[0]), dtype=torch.float32, distributed_config=split).train()
    return plain(work, model, adamw(model.parameters(), foreach=False))  # its parameters mix tensors and DTensors


def dtensor_tp(sequence: bool) -> Callable[[Workload], Trainer]:
    """`parallelize_module` as torch's tutorial writes it for a LLaMA.

    sequence: the residual stream is sharded along the sequence, and the loss is computed from logits sharded on the vocabulary.
    """

    def make(work: Workload) -> Trainer:
        from torch.distributed.tensor import Replicate, Shard
        from torch.distributed.tensor.parallel import (
            ColwiseParallel,
            PrepareModuleInput,
            RowwiseParallel,
            SequenceParallel,
            loss_parallel,
            parallelize_module,
        )

        start(work)
        mesh = init_device_mesh(work.device, (dist.get_world_size(),))
        model = dense(work)
        stream = Shard(1) if sequence else Replicate()
        row = {"output_layouts": stream}
        layer_plan: dict[str, Any] = {
            **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
            "self_attn.o_proj": RowwiseParallel(**row),
            "mlp.gate_proj": ColwiseParallel(),
            "mlp.up_proj": ColwiseParallel(),
            "mlp.down_proj": RowwiseParallel(**row),
        }
        if sequence:
            layer_plan |= {
                "input_layernorm": SequenceParallel(),
                "post_attention_layernorm": SequenceParallel(),
                "self_attn": PrepareModuleInput(
                    input_kwarg_layouts={"hidden_states": stream}, desired_input_kwarg_layouts={"hidden_states": Replicate()}
                ),
                "mlp": PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),)),
            }
        for layer in model.model.layers:
            parallelize_module(layer, mesh, layer_plan)
        head_input = stream
        ends: dict[str, Any] = {
            # The whole sequence leaves the embedding: positions and the mask are made from its shape.
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
            "lm_head": ColwiseParallel(
                input_layouts=head_input,
                output_layouts=Shard(-1) if sequence else Replicate(),
                use_local_output=not sequence,
            ),
        }
        if sequence:
            ends["model.norm"] = SequenceParallel()
            ends["model.layers.0"] = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(stream,))
        parallelize_module(model, mesh, ends)
        sharded = [p for p in model.parameters() if hasattr(p, "placements")]
        others = [p for p in model.parameters() if not hasattr(p, "placements")]
        groups: Any = [{"params": params} for params in (sharded, others) if params]  # foreach does not mix the two
        trainer = plain(work, model, adamw(groups))
        if not sequence:
            return trainer

        def step(tokens: Tensor) -> Tensor:
            with loss_parallel():
                return trainer.step(tokens)

        return Trainer(step)

    return make


# Pipeline -----------------------------------------------------------------------------------------------------------------


class _Stage(nn.Module):
    """Half of a HuggingFace LLaMA, written by hand, as torch.distributed.pipelining asks for."""

    def __init__(self, model: Any, rank: int, ranks: int) -> None:
        super().__init__()
        layers = model.model.layers
        share = -(-len(layers) // ranks)
        self.embed = model.model.embed_tokens if rank == 0 else None
        self.layers = layers[rank * share : (rank + 1) * share]
        self.rotary = model.model.rotary_emb
        self.norm, self.head = (model.model.norm, model.lm_head) if rank == ranks - 1 else (None, None)

    def forward(self, x: Tensor) -> Tensor:
        states = x if self.embed is None else self.embed(x)
        positions = torch.arange(states.shape[1], device=states.device)[None]
        tables = self.rotary(states, positions)
        for layer in self.layers:
            states = layer(states, attention_mask=None, position_ids=positions, position_embeddings=tables)
        return states if self.head is None or self.norm is None else self.head(self.norm(states))


def torch_pipelining(work: Workload) -> Trainer:
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    start(work)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = _Stage(dense(work), rank, ranks)
    stage = PipelineStage(model, rank, ranks, torch.device(work.device))

    def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
        shifted = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), shifted.flatten())

    count = max(work.micro_batches, ranks)
    schedule = Schedule1F1B(stage, n_microbatches=count, loss_fn=loss_of)
    optimizer = adamw(model.parameters())

    def step(tokens: Tensor) -> Tensor:
        losses: list[Tensor] = []
        with autocast(work):
            if rank == 0:
                schedule.step(tokens)
            elif rank == ranks - 1:
                schedule.step(target=tokens, losses=losses)
            else:
                schedule.step()
        optimizer.step()
        optimizer.zero_grad()
        loss = torch.stack(losses).mean().detach().float() if losses else torch.zeros((), device=work.device)
        dist.broadcast(loss, ranks - 1)
        return loss

    return Trainer(step)


# shardcomp ----------------------------------------------------------------------------------------------------------------


def sharded_by_us(**options: Any) -> Callable[[Workload], Trainer]:
    def make(work: Workload) -> Trainer:
        import shardcomp
        from shardcomp import presets

        data = options.get("data", 1)
        rows = work.sequences // data // max(work.micro_batches, options.get("pipeline", 1))
        policy = shardcomp.Policy.load("llama", precision=work.precision, micro_batch=rows, **options)
        model = shardcomp.shard(presets.build(work.config(), torch.float32), policy).train()
        optimizer = shardcomp.AdamW(model.parameters(), lr=LEARNING_RATE)

        def step(tokens: Tensor) -> Tensor:
            result = model.train_step(input_ids=tokens, labels=tokens)
            model.optimizer_step(optimizer)
            optimizer.zero_grad()
            return result.loss

        return Trainer(step, data)

    return make


def start(work: Workload) -> None:
    """Join the process group that the environment describes."""
    if not dist.is_initialized():
        dist.init_process_group("nccl" if work.device == "cuda" else "gloo")


CONTENDERS = [
    Contender("HuggingFace eager", "one rank", 1, hf_eager),
    Contender("HuggingFace + torch.compile", "one rank", 1, hf_compile),
    Contender("HuggingFace + Liger-Kernel", "one rank", 1, hf_liger),
    Contender("FSDP2 of one rank", "one rank", 1, fsdp2(reshard=False)),
    Contender("shardcomp", "one rank", 1, sharded_by_us()),
    Contender("shardcomp, kernels = none", "one rank", 1, sharded_by_us(kernels="none")),
    Contender("shardcomp, compile = true", "one rank", 1, sharded_by_us(compile=True)),
    Contender("DDP", "data 2", 2, ddp),
    Contender("FSDP2, reshard", "data 2", 2, fsdp2(reshard=True)),
    Contender("FSDP2, keep", "data 2", 2, fsdp2(reshard=False)),
    Contender("Accelerate DDP", "data 2", 2, accelerate_ddp),
    Contender("DeepSpeed ZeRO-1", "data 2", 2, deepspeed_zero(1)),
    Contender("DeepSpeed ZeRO-3", "data 2", 2, deepspeed_zero(3)),
    Contender("shardcomp zero 0", "data 2", 2, sharded_by_us(data=2, zero=0)),
    Contender("shardcomp zero 1", "data 2", 2, sharded_by_us(data=2, zero=1)),
    Contender("shardcomp zero 3", "data 2", 2, sharded_by_us(data=2, zero=3)),
    Contender("transformers TP", "tensor 2", 2, transformers_tp),
    Contender("DTensor TP", "tensor 2", 2, dtensor_tp(sequence=False)),
    Contender("DTensor TP + SP + loss parallel", "tensor 2", 2, dtensor_tp(sequence=True)),
    Contender("shardcomp tensor 2", "tensor 2", 2, sharded_by_us(tensor=2, sequence_parallel=False)),
    Contender("shardcomp tensor 2 + SP", "tensor 2", 2, sharded_by_us(tensor=2, sequence_parallel=True)),
    Contender("torch pipelining", "pipeline 2", 2, torch_pipelining),
    Contender("shardcomp pipeline 2", "pipeline 2", 2, sharded_by_us(pipeline=2)),
]
"""Every row of the table, topology by topology."""
