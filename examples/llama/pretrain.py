"""Pretrain a HuggingFace causal language model under a shardcomp policy.

    python examples/llama/pretrain.py -c tiny
    torchrun --nproc-per-node 2 examples/llama/pretrain.py -c tiny --tensor 2
    torchrun --nproc-per-node 8 examples/llama/pretrain.py -c config.json -d corpus.txt -l 2048 -b 4 --tensor 4 -o trained

Tokens are bytes; without -d the text is the source of Python's standard library on this machine. --seed decides the initial
weights and the order of the samples; neither depends on the topology.

With --checkpoint-dir the run is saved while it trains, and the same command resumes it: bit for bit under the same plan, within
rounding under another one. SIGTERM and SIGUSR1, sent to any rank, save the run and end it after the current step.

Exit status: 0 trained, or stopped and saved; 1 the run failed (losses that are not finite, a last save that failed); 2 bad
input, reported in one line before a process group or memory is allocated.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import set_seed

import data
import shardcomp
from chart import write_chart
from interruptions import Interval, end_with_the_launcher
from shardcomp import checkpoint, presets
from shardcomp.policy.options import add_option_flags, flags, joined, options_from
from shardcomp.training.loss_monitor import DivergedError
from training import Run, RunError, held_out_loss

PATIENCE = 30.0
"""Seconds for which a rank that fails waits for rank 0 to say why."""

SAVED_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
"""The files that --save-dir overwrites. A directory with others is refused."""


class InputError(Exception):
    """The command line asks for what cannot be done."""


class Parser(argparse.ArgumentParser):
    """Raises `InputError`, where argparse would print its usage on every rank."""

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

    parse.__name__ = kind.__name__  # argparse's message has this name if the text is not a number
    return parse


def parser() -> Parser:
    """The command line. Every option of a policy is a flag, with the same name as in the shardcomp command."""
    result = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = result.add_argument
    add("-c", "--config", metavar="MODEL", help="preset, directory or config.json (default: that of --load, else tiny)")
    add("-d", "--dataset", metavar="FILE", type=Path, action="append", help="text file, repeatable (default: Python's library)")
    add("-l", "--max-length", metavar="N", type=number(int, 2), default=256, help="tokens in a sequence (%(default)s)")
    add("-b", "--batch-size", metavar="N", type=number(int, 1), default=8, help="samples per data-parallel rank (%(default)s)")
    add("--steps", metavar="N", type=number(int, 1), default=300, help="optimizer steps (%(default)s)")
    add("--lr", metavar="X", type=number(float, 0, above=True), default=3e-4, help="highest learning rate (%(default)s)")
    add("--warmup", metavar="N", type=number(int, 0), default=20, help="steps of linear warm-up, then cosine (%(default)s)")
    add("--weight-decay", metavar="X", type=number(float, 0), default=0.1, help="of weights with 2 dimensions (%(default)s)")
    add("--optimizer", choices=("torch", "shardcomp"), default="torch", help="whose AdamW (%(default)s)")
    add("--grad-clip", metavar="X", type=number(float, 0, above=True), default=1.0, help="largest norm, or inf (%(default)s)")
    add("-o", "--save-dir", metavar="DIR", type=Path, help="write a HuggingFace directory at the end")
    add("-f", "--load", metavar="DIR", type=Path, help="start from the weights of a HuggingFace directory")
    add("--checkpoint-dir", metavar="DIR", type=Path, help="write checkpoints here, and resume from the newest")
    add("--save-interval", metavar="N", type=Interval.parse, help="checkpoint every N steps, or every Nm minutes (30m)")
    add("--keep", metavar="K", type=number(int, 1), help="how many of the last checkpoints to keep (3)")
    add("--keep-every", metavar="M", type=number(int, 1), help="also keep those whose step is a multiple of M")
    add("--resume", metavar="HOW", default="auto", help="auto: from the newest good checkpoint; never; or a checkpoint (auto)")
    add(
        "--export-hf", action="store_true", help="also write each checkpoint as a HuggingFace directory, DIR/huggingface/step-N"
    )
    add("--patience", metavar="S", type=number(float, 0), help="seconds to wait for another job that uses DIR (60)")
    add("--time-limit", metavar="MIN", type=number(float, 0, above=True), help="save the run and end it after so many minutes")
    add("--log-file", metavar="FILE", type=Path, help="append a JSON object for every step: loss, norm, digest of the batch")
    add(
        "--timeout",
        metavar="S",
        type=number(float, 1),
        default=300.0,
        help="end a run without a step for S seconds (300)",
    )
    add("--spike", metavar="X", type=number(float, 1, above=True), default=3.0, help="a loss X times the median is bad (3)")
    add(
        "--bad-steps",
        metavar="N",
        type=number(int, 1),
        default=10,
        help="end a run with N bad steps in the last 128 (10)",
    )
    add("--policy", metavar="NAME", help="policy: a name in policies/ or a file (default: the one for the model's type)")
    add_option_flags(result)
    return result


def file_violations(args: argparse.Namespace) -> list[str]:
    """The violations of the paths on the command line."""
    unreadable = [path for path in args.dataset or [] if not (path.is_file() and os.access(path, os.R_OK))]
    violations = [f"--dataset {path}: no such file, or it cannot be read" for path in unreadable]
    if args.load and not args.load.is_dir():
        violations.append(f"--load {args.load}: no such directory")
    violations += checkpoint_violations(args)
    if args.log_file:
        violations += folder_violations("--log-file", args.log_file.absolute().parent)
        if args.log_file.is_dir():
            violations.append(f"--log-file {args.log_file}: is a directory")
    if args.save_dir is None:
        return violations
    unwritable = folder_violations("--save-dir", args.save_dir)
    violations += unwritable
    if not unwritable and args.save_dir.exists():
        foreign = sorted(p.name for p in args.save_dir.iterdir() if not any(fnmatch.fnmatch(p.name, s) for s in SAVED_FILES))
        if foreign:
            violations.append(
                f"--save-dir {args.save_dir}: holds {foreign[0]}, which is not part of a saved model; name a new directory"
            )
    return violations


def folder_violations(flag: str, path: Path) -> list[str]:
    """The violation of a directory that cannot be written to or created."""
    if path.exists() and not path.is_dir():
        return [f"{flag} {path}: exists and is not a directory"]
    nearest = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        return [f"{flag} {path}: {nearest} cannot be written to"]
    return []


def checkpoint_violations(args: argparse.Namespace) -> list[str]:
    """The violations of the flags about checkpoints."""
    if args.checkpoint_dir is None:
        flags_of_checkpoints = {
            "--save-interval": args.save_interval,
            "--keep": args.keep,
            "--keep-every": args.keep_every,
            "--export-hf": args.export_hf or None,
            "--patience": args.patience,
        }
        violations = [
            f"{flag} says how checkpoints are kept: give --checkpoint-dir as well"
            for flag, value in flags_of_checkpoints.items()
            if value is not None
        ]
    else:
        violations = folder_violations("--checkpoint-dir", args.checkpoint_dir)
    if args.resume not in ("auto", "never"):
        path = Path(args.resume)
        if not path.is_dir():
            violations.append(f"--resume {path}: no such directory; give auto, never, or a checkpoint")
        elif not (path / "checkpoint.json").exists() and not checkpoint.checkpoints(path):
            violations.append(f"--resume {path}: holds no checkpoint")
    elif args.resume == "never" and args.checkpoint_dir and (newest := checkpoint.latest(args.checkpoint_dir)):
        violations.append(f"--resume never: {newest} exists; name a new --checkpoint-dir, or resume with --resume auto")
    return violations


def size_violations(args: argparse.Namespace, config: Any, corpus: data.Corpus, batch: int) -> list[str]:
    """The violations between vocabulary, lengths, batches and text. `batch`: how many samples a step has."""
    violations = []
    if config.vocab_size < data.VOCABULARY:
        violations.append(
            f"vocab_size = {config.vocab_size} is too small: tokens are bytes and need at least {data.VOCABULARY}"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and args.max_length > longest:
        violations.append(f"--max-length {args.max_length}: the model's max_position_embeddings is {longest}")
    for name, sequences, least in (("held-out", corpus.held_out, 1), ("training", corpus.train, batch)):
        if len(sequences) < least:
            violations.append(
                f"the dataset is too small: its {name} part holds {len(sequences)} sequences of {args.max_length} tokens and "
                f"needs {least}; give more text, or lower --batch-size or --max-length"
            )
    return violations


def agree_on_text(fingerprint: str) -> None:
    """Refuse ranks that read different text, as machines with different releases of Python do.

    The ranks of a tensor-parallel group must see the same samples: otherwise training would be wrong in silence.
    """
    if not dist.is_initialized():
        return
    fingerprints: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(fingerprints, fingerprint)
    other = [rank for rank, theirs in enumerate(fingerprints) if theirs != fingerprints[0]]
    if other:
        raise InputError(f"rank {other[0]} reads other text than rank 0: give the same files to all with --dataset")


def pretrain(argv: Sequence[str] | None, say: Callable[[str], None]) -> None:
    """Check everything, then train. Raises InputError or shardcomp.ShardError for what the caller can correct."""
    args = parser().parse_args(joined(sys.argv[1:] if argv is None else argv))
    if violations := file_violations(args):
        raise InputError("; ".join(violations))
    options = options_from(args)
    if (last := last_checkpoint_if_finished(args)) is not None:
        say(f"complete: nothing is left to train of {args.steps} steps; give more --steps, or a new --checkpoint-dir")
        say_where(args, options, last, say)
        return
    model = presets.build(presets.config_of(args.config or str(args.load or "tiny")))
    if args.policy:
        policy = shardcomp.Policy.load(args.policy, **options)
    else:
        policy = shardcomp.Policy.for_model(model.config.model_type, **options)
    batch = args.batch_size * policy.mesh(int(os.environ.get("WORLD_SIZE", "1"))).dp
    corpus = data.build(data.read(args.dataset) if args.dataset else data.standard_library(), args.max_length)
    if violations := size_violations(args, model.config, corpus, batch):
        raise InputError("; ".join(violations))

    sharded = shardcomp.shard(model, policy, checkpoint=args.load)
    agree_on_text(corpus.fingerprint)
    degrees = " · ".join(f"{axis} {sharded.mesh[axis].size()}" for axis in sharded.mesh.mesh_dim_names)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    say(
        f"{model.config.model_type}: {parameters:,} parameters on {degrees}; {len(corpus.train):,} training sequences, "
        f"{len(corpus.held_out):,} held out"
    )
    set_seed(policy.options.seed)  # the generators of Python, NumPy and torch, which checkpoints have too
    with Run(sharded, corpus, args, policy.options.seed, say) as run:
        run.open()
        why = run.train()
    if why:
        next_run = "the same command resumes here" if run.saved_at == run.step else "nothing was saved: no --checkpoint-dir"
        say(f"ended by {why} after step {run.step}; {next_run}")
        return
    say(f"held-out loss {held_out_loss(sharded, corpus.held_out, args.batch_size):.4f}")
    if args.save_dir:
        sharded.save_pretrained(args.save_dir)
        say(f"saved to {args.save_dir}")
    if dist.get_rank() == 0:
        say_where(args, options, checkpoint.latest(args.checkpoint_dir) if args.checkpoint_dir else None, say)


def last_checkpoint_if_finished(args: argparse.Namespace) -> Path | None:
    """The checkpoint of the last step, if an earlier run has done all steps and written --save-dir."""
    if args.checkpoint_dir is None or args.resume != "auto":
        return None
    if args.save_dir is not None and not (args.save_dir / "config.json").exists():
        return None
    newest = checkpoint.latest(args.checkpoint_dir)
    return newest if newest is not None and step_of(newest) >= args.steps else None


def step_of(path: Path) -> int:
    """The step of a checkpoint."""
    return int(json.loads((path / "checkpoint.json").read_text())["step"])


def say_where(args: argparse.Namespace, options: Mapping[str, Any], newest: Path | None, say: Callable[[str], None]) -> None:
    """Say where the files of the run are, and what to do next. Draw the chart beside the log."""
    name = args.config or str(args.load or "tiny")
    if newest is not None:
        say(f"checkpoint  {newest}")
    if args.save_dir is not None:
        say(f"model       {args.save_dir}, for AutoModelForCausalLM.from_pretrained")
    if args.log_file is not None and args.log_file.exists():
        say(f"log         {args.log_file}")
        chart = args.log_file.with_suffix(".svg")
        if write_chart(args.log_file, chart, f"loss of {name}"):
            say(f"chart       {chart}")
    words = [name, *(["--policy", args.policy] if args.policy else []), *flags(options)]
    say(f"next        {shlex.join(['shardcomp', 'inspect', *words, '--listing'])}")
    if newest is not None:
        say(f"            {shlex.join(['shardcomp', 'convert', str(args.checkpoint_dir), 'exported', '--dtype', 'bf16'])}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    rank = int(os.environ.get("RANK", "0"))
    end_with_the_launcher()
    try:
        pretrain(argv, say=lambda line: print(line, flush=True) if rank == 0 else None)
    except (InputError, shardcomp.ShardError, RunError) as error:
        # torchrun ends all ranks when the first one exits. That should be rank 0, so that its line is seen. The others speak
        # only if rank 0 does not fail as well, as with a file that is missing on one machine.
        if rank > 0:
            time.sleep(PATIENCE)
        print(f"pretrain.py: {error}" if rank == 0 else f"pretrain.py, rank {rank}: {error}", file=sys.stderr, flush=True)
        return 1 if isinstance(error, (RunError, DivergedError)) else 2
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(record(main)())
