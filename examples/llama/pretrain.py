"""Pretrain a HuggingFace causal language model under a shardcomp policy.

    python examples/llama/pretrain.py -c tiny
    torchrun --nproc-per-node 2 examples/llama/pretrain.py -c tiny --tensor 2
    torchrun --nproc-per-node 8 examples/llama/pretrain.py -c config.json -d corpus.txt -l 2048 -b 4 --tensor 4 -o trained

Tokens are bytes; without -d the text is the source of Python's standard library on this machine. --seed decides the initial
weights and the order of the samples; neither depends on the topology. Exit status: 0 trained, 1 the run failed (a loss that is
not finite), 2 bad input, told in one line before a process group or memory is touched.
"""

from __future__ import annotations

import argparse
import fnmatch
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record

import data
import shardcomp
from shardcomp import presets
from shardcomp.options import add_option_flags, options_from

HELD_OUT_SEQUENCES = 256
"""How many held-out sequences the final loss is taken over, at most."""

PATIENCE = 30.0
"""Seconds for which a rank that fails waits for rank 0 to say why."""

SAVED_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
"""What a directory may hold that --save-dir writes over."""


class InputError(Exception):
    """What was asked for on the command line cannot be done."""


class Parser(argparse.ArgumentParser):
    """Raises `InputError` where argparse would print its usage from every rank."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise InputError(message)


def number(kind: Callable[[str], Any], least: float, *, above: bool = False) -> Callable[[str], Any]:
    """An argparse type: a number of at least (or `above`) `least`."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not (value > least if above else value >= least):
            raise argparse.ArgumentTypeError(f"{text} is not {'above' if above else 'at least'} {least}")
        return value

    parse.__name__ = kind.__name__  # argparse names it where the text is no number at all
    return parse


def parser() -> Parser:
    """The command line. Every option of a policy is a flag, with the name it has in the shardcomp command."""
    found = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = found.add_argument
    add("-c", "--config", metavar="MODEL", help="preset, directory or config.json (default: that of --load, else tiny)")
    add("-d", "--dataset", metavar="FILE", type=Path, action="append", help="text file, repeatable (default: Python's library)")
    add("-l", "--max-length", metavar="N", type=number(int, 2), default=256, help="tokens in a sequence (%(default)s)")
    add("-b", "--batch-size", metavar="N", type=number(int, 1), default=8, help="samples per data-parallel rank (%(default)s)")
    add("--steps", metavar="N", type=number(int, 1), default=300, help="optimizer steps (%(default)s)")
    add("--lr", metavar="X", type=number(float, 0, above=True), default=3e-4, help="highest learning rate (%(default)s)")
    add("--warmup", metavar="N", type=number(int, 0), default=20, help="steps of linear warm-up, then cosine (%(default)s)")
    add("--weight-decay", metavar="X", type=number(float, 0), default=0.1, help="of weights with 2 dimensions (%(default)s)")
    add("--grad-clip", metavar="X", type=number(float, 0, above=True), default=1.0, help="largest norm, or inf (%(default)s)")
    add("-o", "--save-dir", metavar="DIR", type=Path, help="write a HuggingFace directory at the end")
    add("-f", "--load", metavar="DIR", type=Path, help="start from the weights of a HuggingFace directory")
    add("--policy", metavar="NAME", help="policy: a name in policies/ or a file (default: the one for the model's type)")
    add_option_flags(found)
    return found


def problems_with_files(args: argparse.Namespace) -> list[str]:
    """What is wrong with the paths that were given."""
    unreadable = [path for path in args.dataset or [] if not (path.is_file() and os.access(path, os.R_OK))]
    found = [f"--dataset {path}: no such file, or it cannot be read" for path in unreadable]
    if args.load and not args.load.is_dir():
        found.append(f"--load {args.load}: no such directory")
    if args.save_dir is None:
        return found
    if args.save_dir.exists() and not args.save_dir.is_dir():
        return [*found, f"--save-dir {args.save_dir}: exists and is no directory"]
    nearest = next(path for path in (args.save_dir, *args.save_dir.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        found.append(f"--save-dir {args.save_dir}: {nearest} cannot be written to")
    elif args.save_dir.exists():
        foreign = sorted(p.name for p in args.save_dir.iterdir() if not any(fnmatch.fnmatch(p.name, s) for s in SAVED_FILES))
        if foreign:
            found.append(
                f"--save-dir {args.save_dir}: holds {foreign[0]}, which is no part of a saved model; name a new directory"
            )
    return found


def problems_with_sizes(args: argparse.Namespace, config: Any, corpus: data.Corpus, batch: int) -> list[str]:
    """What does not fit together: vocabulary, lengths, batches and text. `batch` samples make a step."""
    found = []
    if config.vocab_size < data.VOCABULARY:
        found.append(f"vocab_size = {config.vocab_size} is too small: tokens are bytes and need at least {data.VOCABULARY}")
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and args.max_length > longest:
        found.append(f"--max-length {args.max_length}: the model's max_position_embeddings is {longest}")
    for name, part, least in (("held-out", corpus.held_out, 1), ("training", corpus.train, batch)):
        if len(part) < least:
            found.append(
                f"the dataset is too small: its {name} part holds {len(part)} sequences of {args.max_length} tokens and needs"
                f" {least}; give more text, or lower --batch-size or --max-length"
            )
    return found


def agree_on_text(fingerprint: str) -> None:
    """Refuse ranks that read different text, as machines with different Python releases do: training on it would be wrong in
    silence, since the ranks of one tensor-parallel group must see the same samples."""
    if not dist.is_initialized():
        return
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, fingerprint)
    other = [rank for rank, theirs in enumerate(found) if theirs != found[0]]
    if other:
        raise InputError(f"rank {other[0]} reads other text than rank 0: give the same files to all with --dataset")


def adamw(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), foreach=True)


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """The share of --lr at a step, counted from 0: a linear rise to 1, then half a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, done))


def held_out_loss(sharded: nn.Module, sequences: Tensor, batch_size: int) -> float:
    """The mean loss over the first `HELD_OUT_SEQUENCES` of `sequences`, the same on every rank, topology and batch size."""
    rank, ranks = sharded.mesh["dp"].get_local_rank(), sharded.mesh["dp"].size()
    count = min(len(sequences), HELD_OUT_SEQUENCES)
    sharded.eval()
    total = 0.0
    for first in range(0, count, batch_size * ranks):
        places = torch.arange(batch_size) + first + rank * batch_size
        tokens = sequences[places.clamp(max=count - 1)].long()
        labels = tokens.masked_fill(places[:, None] >= count, -100)  # rows past the end only fill the last batch
        loss = sharded.eval_step(input_ids=tokens.to(sharded.device), labels=labels.to(sharded.device)).loss
        total += float(loss) * min(batch_size * ranks, count - first)
    return total / count


def train(sharded: nn.Module, corpus: data.Corpus, args: argparse.Namespace, seed: int, say: Callable[[str], None]) -> None:
    """All steps, a line for each. Raises FloatingPointError at a loss that is not finite."""
    rank, ranks = sharded.mesh["dp"].get_local_rank(), sharded.mesh["dp"].size()
    batch = args.batch_size * ranks
    optimizer = adamw(sharded, args)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, args.steps, args.warmup))
    sharded.train()
    began = last = time.perf_counter()
    for done in range(1, args.steps + 1):
        first = (done - 1) * batch + rank * args.batch_size
        tokens = data.shuffled(corpus.train, first, args.batch_size, seed).to(sharded.device)
        step = sharded.train_step(input_ids=tokens, labels=tokens)
        norm = float(sharded.clip_grad_norm_(args.grad_clip))
        loss = float(step.loss)
        scaled = sharded.loss_scale.enabled and sharded.loss_scale.scale > 1  # a lower scale may mend what overflows
        if not math.isfinite(loss) or (bool(step.skipped) and not scaled):
            raise FloatingPointError(f"step {done}: loss {loss}, gradient norm {norm}; try a lower --lr or a longer --warmup")
        if sharded.optimizer_step(optimizer):
            schedule.step()
        else:
            say(
                f"step {done}: gradients overflowed and nothing was changed; the loss scale is now {sharded.loss_scale.scale:g}"
            )
        optimizer.zero_grad()
        now = time.perf_counter()
        rate, left = batch * args.max_length / (now - last), (now - began) / done * (args.steps - done)
        last = now
        say(
            f"step {done:>{len(str(args.steps))}}/{args.steps}  tokens {done * batch * args.max_length:,}  loss {loss:.4f}"
            f"  grad norm {norm:.3f}  {rate:,.0f} tokens/s  ETA {timedelta(seconds=round(left))}"
        )
    say(f"held-out loss {held_out_loss(sharded, corpus.held_out, args.batch_size):.4f}")


def pretrain(argv: Sequence[str] | None, say: Callable[[str], None]) -> None:
    """Check everything, then train. Raises InputError or shardcomp.ShardError for what the caller can mend."""
    args = parser().parse_args(argv)
    if found := problems_with_files(args):
        raise InputError("; ".join(found))
    model = presets.build(presets.config_of(args.config or str(args.load or "tiny")))
    options = options_from(args)
    if args.policy:
        policy = shardcomp.Policy.load(args.policy, **options)
    else:
        policy = shardcomp.Policy.for_model(model.config.model_type, **options)
    batch = args.batch_size * policy.mesh(int(os.environ.get("WORLD_SIZE", "1"))).dp
    corpus = data.build(data.read(args.dataset) if args.dataset else data.standard_library(), args.max_length)
    if found := problems_with_sizes(args, model.config, corpus, batch):
        raise InputError("; ".join(found))

    sharded = shardcomp.shard(model, policy, checkpoint=args.load)
    agree_on_text(corpus.fingerprint)
    degrees = " · ".join(f"{axis} {sharded.mesh[axis].size()}" for axis in sharded.mesh.mesh_dim_names)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"{model.config.model_type}: {parameters:,} parameters on {degrees}; {len(corpus.train):,} training sequences, "
        f"{len(corpus.held_out):,} held out"
    )
    train(sharded, corpus, args, policy.options.seed, say)
    if args.save_dir:
        sharded.save_pretrained(args.save_dir)
        say(f"saved to {args.save_dir}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    rank = int(os.environ.get("RANK", "0"))
    try:
        pretrain(argv, say=lambda line: print(line, flush=True) if rank == 0 else None)
    except (InputError, shardcomp.ShardError, FloatingPointError) as error:
        # torchrun ends all ranks when the first one exits. The others leave that to rank 0, so that its line is seen, and only
        # speak where it does not fail as well: a file that is missing on one machine.
        if rank > 0:
            time.sleep(PATIENCE)
        print(f"pretrain.py: {error}" if rank == 0 else f"pretrain.py, rank {rank}: {error}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, FloatingPointError) else 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(record(main)())
