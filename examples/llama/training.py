"""The steps of a run: batches, updates, checkpoints, the log, and when it ends."""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import shardcomp
from data import Corpus
from interruptions import Interruptions, Interval
from shardcomp import checkpoint
from shardcomp.training.loss_monitor import LossMonitor
from shardcomp.training.sample_stream import digest_text
from shardcomp.training.watchdog import Watchdog

HELD_OUT_SEQUENCES = 256
"""How many held-out sequences the final loss is taken over, at most."""

INTERVAL, KEEP, PATIENCE = Interval(minutes=30), 3, 60.0
"""The defaults of --save-interval, --keep and --patience."""


class RunError(Exception):
    """The run failed, although the command line was right."""


class Log:
    """The log: a JSON object a line, for every step and every event.

    Only the first rank writes. A resumed run appends: of two lines for a step, the later one counts.
    """

    def __init__(self, path: Path | None, first: bool) -> None:
        self._file = None
        if path is not None and first:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "a+", buffering=1)  # noqa: SIM115
            if not ends_a_line(path):
                self._file.write("\n")

    def write(self, **entry: Any) -> None:
        """Append a line."""
        if self._file is not None:
            self._file.write(json.dumps(entry) + "\n")

    def close(self) -> None:
        """Close the file. There are no more lines."""
        if self._file is not None:
            self._file.close()


def ends_a_line(path: Path) -> bool:
    """Whether a file is empty, or its last line is complete: a kill may have cut it off."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return file.read(1) in (b"", b"\n")


def adamw(model: nn.Module, args: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    options: dict[str, Any] = {"lr": args.lr, "betas": (0.9, 0.95)}
    if args.optimizer == "shardcomp":
        return shardcomp.AdamW(groups, **options)
    return torch.optim.AdamW(groups, foreach=True, **options)


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """The factor of --lr at a step, counted from 0: it rises linearly to 1, then falls to 0.1 along half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, progress))


class Run:
    """A run on this rank. `say` prints on the first rank."""

    def __init__(
        self, sharded: nn.Module, corpus: Corpus, args: argparse.Namespace, seed: int, say: Callable[[str], None]
    ) -> None:
        self.sharded, self.corpus, self.args, self.say = sharded, corpus, args, say
        axis = sharded.mesh["dp"]
        self.batch = args.batch_size * axis.size()
        self.optimizer = adamw(sharded, args)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate(step, args.steps, args.warmup)
        )
        self.stream = shardcomp.SampleStream(corpus.train, seed, axis.get_local_rank(), axis.size(), corpus.fingerprint)
        others = [name for name in sharded.mesh.mesh_dim_names if name != "dp"]
        self.speaks_for_batch = all(sharded.mesh[name].get_local_rank() == 0 for name in others)
        first = dist.get_rank() == 0
        self.log = Log(args.log_file, first)
        self.interruptions = Interruptions(args.save_interval or INTERVAL, args.time_limit, first)
        self.monitor = LossMonitor(factor=args.spike, limit=args.bad_steps)
        self.step = 0
        self.saved_at: int | None = None  # the step of the newest checkpoint
        self.saver: checkpoint.Saver | None = None
        self.failure: str | None = None  # of the last save

    def open(self) -> None:
        """Open the directory of checkpoints, and resume from the newest or as --resume says."""
        args = self.args
        restored = None
        if args.checkpoint_dir:
            self.saver = checkpoint.Saver(
                args.checkpoint_dir,
                keep=args.keep or KEEP,
                keep_every=args.keep_every,
                export=args.export_hf,
                patience=PATIENCE if args.patience is None else args.patience,
                say=self.say,
            )
            if args.resume != "never":
                path = None if args.resume == "auto" else args.resume
                restored = self.saver.resume(self.sharded, self.optimizer, scheduler=self.schedule, path=path)
        elif args.resume not in ("auto", "never"):
            restored = checkpoint.load(args.resume, self.sharded, self.optimizer, scheduler=self.schedule)
        if restored is not None:
            self.stream.load_state_dict(restored.extra["stream"])
            self.monitor.load_state_dict(restored.extra["monitor"])
            self.step = self.saved_at = restored.step
            note = "" if restored.random else "; another mesh: dropout draws other numbers"
            self.say(f"resuming from step {restored.step}: {restored.path}{note}")
        mesh = {name: self.sharded.mesh[name].size() for name in self.sharded.mesh.mesh_dim_names}
        self.log.write(event="start", step=self.step, checkpoint=str(restored.path) if restored else None, mesh=mesh)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Wait for the save in flight, and release the directory. An error of the block has precedence over the save's."""
        try:
            if self.saver is not None:
                self.saver.close()
        except Exception as problem:
            if error is None:
                raise
            self.say(f"NOT SAVED: {problem}")
        finally:
            self.log.close()

    def train(self) -> str | None:
        """Train all steps that are left, and wait for the last checkpoint. Returns why the run ended before the last step, or
        None."""
        if self.step >= self.args.steps:
            self.say(f"step {self.step} of {self.args.steps}: nothing is left to train; give more --steps, or a new directory")
        self.sharded.train()
        why = None
        with self.interruptions.handled():
            self.watchdog = Watchdog(self.args.timeout)
            try:
                began, since = time.perf_counter(), self.step
                while self.step < self.args.steps and why is None:
                    why = self.advance(began, since)
                self.finish_saves()
            except Exception as error:
                if (gone := self.watchdog.explain(error)) is None:
                    raise
                raise RunError(gone) from error
            finally:
                self.watchdog.stop()
        return why

    def advance(self, began: float, since: int) -> str | None:
        """Train one step. Returns why the run should end after it, or None."""
        sharded, args, started = self.sharded, self.args, time.perf_counter()
        tokens, digest = self.stream.next(args.batch_size)
        tokens = tokens.to(sharded.device)
        result = sharded.train_step(input_ids=tokens, labels=tokens)
        total_norm = sharded.grad_norm()
        rate = self.optimizer.param_groups[0]["lr"]
        scaled = sharded.loss_scale.enabled and sharded.loss_scale.scale > 1  # a lower scale may prevent the overflow
        updated = sharded.optimizer_step(self.optimizer, norm=total_norm, max_norm=args.grad_clip)
        loss, norm = float(result.loss), float(total_norm)
        if updated:
            self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1
        batch, signalled, over, due = self.agreed(digest)
        seconds = time.perf_counter() - started
        if not updated:
            scale = f"; the loss scale is now {sharded.loss_scale.scale:g}" if sharded.loss_scale.enabled else ""
            self.say(f"step {self.step}: gradients are not finite and nothing was changed{scale}")
        left = (time.perf_counter() - began) / (self.step - since) * (args.steps - self.step)
        self.say(
            f"step {self.step:>{len(str(args.steps))}}/{args.steps}  tokens {self.stream.position * args.max_length:,}"
            f"  loss {loss:.4f}  grad norm {norm:.3f}  {self.batch * args.max_length / seconds:,.0f} tokens/s"
            f"  ETA {timedelta(seconds=round(left))}"
        )
        self.log.write(
            step=self.step,
            loss=loss,
            norm=norm,
            digest=batch,
            lr=rate,
            tokens=self.stream.position * args.max_length,
            skipped=not updated,
            seconds=round(seconds, 4),
        )
        self.watchdog.beat(f"step {self.step}")
        self.monitor.observe(self.step, loss, not updated and not scaled)
        why = "a signal to stop" if signalled else "the time limit" if over else None
        if self.saver is not None and (due or why or self.step == args.steps):
            self.save()
        return why

    def agreed(self, digest: int) -> tuple[str, int, int, int]:
        """The digest of the whole batch, and whether any rank asks to stop by a signal, to stop by the time, or to save."""
        own_digest = digest if self.speaks_for_batch else 0
        sums = torch.tensor([own_digest, *self.interruptions.asked(self.step)], dtype=torch.int64, device=self.sharded.device)
        dist.all_reduce(sums)
        total, signalled, over, due = sums.tolist()
        return digest_text(total), signalled, over, due

    def save(self) -> None:
        """Begin a checkpoint of this step. If it fails, the log says so and the run continues: earlier ones are intact."""
        assert self.saver is not None
        for attempt in (self._end_save, self._begin_save):
            try:
                attempt()
            except shardcomp.CheckpointError as problem:
                self.failure = str(problem)
                self.say(f"NOT SAVED: {problem}")
                self.log.write(event="not saved", step=self.step, why=str(problem))

    def _begin_save(self) -> None:
        assert self.saver is not None
        began = time.perf_counter()
        path = self.saver.save(
            self.sharded,
            self.optimizer,
            step=self.step,
            scheduler=self.schedule,
            extra={"stream": self.stream.state_dict(), "monitor": self.monitor.state_dict()},
        )
        self.failure, self.saved_at = None, self.step
        self.log.write(event="save", step=self.step, path=str(path), seconds=round(time.perf_counter() - began, 4))

    def _end_save(self) -> None:
        """Wait for the save in flight, and report progress to the watchdog meanwhile."""
        if self.saver is not None:
            self.saver.wait(lambda: self.watchdog.beat(f"writing the checkpoint of step {self.saved_at}"))

    def finish_saves(self) -> None:
        """Wait until the last checkpoint is on the disk. Raises RunError if it failed."""
        try:
            self._end_save()
        except shardcomp.CheckpointError as problem:
            self.failure = str(problem)
        if self.failure is not None:
            raise RunError(f"the last checkpoint failed: {self.failure}")


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
