"""Pretrain a HuggingFace causal language model under a shardcomp policy.

    python examples/llama/pretrain.py -c tiny
    torchrun --nproc-per-node 2 examples/llama/pretrain.py -c tiny --tensor 2
    torchrun --nproc-per-node 8 examples/llama/pretrain.py -c config.json -d corpus.txt -l 2048 -b 4 --tensor 4 -o trained

Tokens are bytes; without -d the text is the source of Python's standard library on this machine. --seed decides the initial
weights and the order of the samples; neither depends on the topology.

With --checkpoint-dir the run is saved while it trains, and the same command goes on where it was: bit for bit under the same
plan, within rounding under another one. SIGTERM and SIGUSR1, sent to any rank, save and end it after the step under way.

Exit status: 0 trained, or stopped and saved; 1 the run failed (losses that are not finite, a last save that failed); 2 bad
input, told in one line before a process group or memory is touched.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record
from transformers import set_seed

import data
import shardcomp
from interruptions import Interval, end_with_the_launcher
from shardcomp import checkpoint, presets
from shardcomp.policy.options import add_option_flags, joined, options_from
from shardcomp.training.loss_monitor import DivergedError
from training import Run, RunError, held_out_loss

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
    add("--optimizer", choices=("torch", "shardcomp"), default="torch", help="whose AdamW (%(default)s)")
    add("--grad-clip", metavar="X", type=number(float, 0, above=True), default=1.0, help="largest norm, or inf (%(default)s)")
    add("-o", "--save-dir", metavar="DIR", type=Path, help="write a HuggingFace directory at the end")
    add("-f", "--load", metavar="DIR", type=Path, help="start from the weights of a HuggingFace directory")
    add("--checkpoint-dir", metavar="DIR", type=Path, help="keep checkpoints here, and go on from the newest")
    add("--save-interval", metavar="N", type=Interval.parse, help="checkpoint every N steps, or every Nm minutes (30m)")
    add("--keep", metavar="K", type=number(int, 1), help="checkpoints that are kept, the last ones (3)")
    add("--keep-every", metavar="M", type=number(int, 1), help="also keep those whose step is a multiple of M")
    add(
        "--resume", metavar="HOW", default="auto", help="auto: from the newest that is good; never; or from a checkpoint (auto)"
    )
    add(
        "--export-hf", action="store_true", help="also write each checkpoint as a HuggingFace directory, DIR/huggingface/step-N"
    )
    add("--patience", metavar="S", type=number(float, 0), help="seconds to wait for a job that has DIR (60)")
    add("--time-limit", metavar="MIN", type=number(float, 0, above=True), help="save and end after so many minutes")
    add("--log-file", metavar="FILE", type=Path, help="append a JSON object for each step: loss, norm, digest of the batch")
    add("--timeout", metavar="S", type=number(float, 1), default=300.0, help="seconds without a step that end a run (300)")
    add("--spike", metavar="X", type=number(float, 1, above=True), default=3.0, help="a loss X times the median is bad (3)")
    add("--bad-steps", metavar="N", type=number(int, 1), default=10, help="bad steps of the last 128 that end a run (10)")
    add("--policy", metavar="NAME", help="policy: a name in policies/ or a file (default: the one for the model's type)")
    add_option_flags(found)
    return found


def problems_with_files(args: argparse.Namespace) -> list[str]:
    """What is wrong with the paths that were given."""
    unreadable = [path for path in args.dataset or [] if not (path.is_file() and os.access(path, os.R_OK))]
    found = [f"--dataset {path}: no such file, or it cannot be read" for path in unreadable]
    if args.load and not args.load.is_dir():
        found.append(f"--load {args.load}: no such directory")
    found += problems_with_checkpoints(args)
    if args.log_file:
        found += problems_with_folder("--log-file", args.log_file.absolute().parent)
        if args.log_file.is_dir():
            found.append(f"--log-file {args.log_file}: is a directory")
    if args.save_dir is None:
        return found
    trouble = problems_with_folder("--save-dir", args.save_dir)
    found += trouble
    if not trouble and args.save_dir.exists():
        foreign = sorted(p.name for p in args.save_dir.iterdir() if not any(fnmatch.fnmatch(p.name, s) for s in SAVED_FILES))
        if foreign:
            found.append(
                f"--save-dir {args.save_dir}: holds {foreign[0]}, which is no part of a saved model; name a new directory"
            )
    return found


def problems_with_folder(flag: str, path: Path) -> list[str]:
    """Why a directory cannot be written to, or made."""
    if path.exists() and not path.is_dir():
        return [f"{flag} {path}: exists and is no directory"]
    nearest = next(each for each in (path, *path.absolute().parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        return [f"{flag} {path}: {nearest} cannot be written to"]
    return []


def problems_with_checkpoints(args: argparse.Namespace) -> list[str]:
    """What is wrong with the flags about checkpoints."""
    if args.checkpoint_dir is None:
        given = {
            "--save-interval": args.save_interval,
            "--keep": args.keep,
            "--keep-every": args.keep_every,
            "--export-hf": args.export_hf or None,
            "--patience": args.patience,
        }
        found = [
            f"{flag} says how checkpoints are kept: give --checkpoint-dir as well" for flag, v in given.items() if v is not None
        ]
    else:
        found = problems_with_folder("--checkpoint-dir", args.checkpoint_dir)
    if args.resume not in ("auto", "never"):
        path = Path(args.resume)
        if not path.is_dir():
            found.append(f"--resume {path}: no such directory; give auto, never, or a checkpoint")
        elif not (path / "checkpoint.json").exists() and not checkpoint.checkpoints(path):
            found.append(f"--resume {path}: holds no checkpoint")
    elif args.resume == "never" and args.checkpoint_dir and (newest := checkpoint.latest(args.checkpoint_dir)):
        found.append(f"--resume never: {newest} is there; name a new --checkpoint-dir, or let the run go on with --resume auto")
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


def pretrain(argv: Sequence[str] | None, say: Callable[[str], None]) -> None:
    """Check everything, then train. Raises InputError or shardcomp.ShardError for what the caller can mend."""
    args = parser().parse_args(joined(sys.argv[1:] if argv is None else argv))
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
    set_seed(policy.options.seed)  # Python's, NumPy's and torch's generators, which checkpoints hold as well
    with Run(sharded, corpus, args, policy.options.seed, say) as run:
        run.open()
        why = run.train()
    if why:
        again = "the same command goes on from here" if run.saved_at == run.step else "nothing was saved: no --checkpoint-dir"
        say(f"ended by {why} after step {run.step}; {again}")
        return
    say(f"held-out loss {held_out_loss(sharded, corpus.held_out, args.batch_size):.4f}")
    if args.save_dir:
        sharded.save_pretrained(args.save_dir)
        say(f"saved to {args.save_dir}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    rank = int(os.environ.get("RANK", "0"))
    end_with_the_launcher()
    try:
        pretrain(argv, say=lambda line: print(line, flush=True) if rank == 0 else None)
    except (InputError, shardcomp.ShardError, RunError) as error:
        # torchrun ends all ranks when the first one exits. The others leave that to rank 0, so that its line is seen, and only
        # speak where it does not fail as well: a file that is missing on one machine.
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
