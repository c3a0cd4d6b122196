"""`resume_check()`: a run of a plan is killed and goes on, and must end as one that nobody disturbed.

The ranks are processes on this machine's CPU, over gloo; they train as a user's script would, with `shardcomp.checkpoint`.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import random
import shlex
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist

from shardcomp import presets
from shardcomp.checkpoint import Saver, directory
from shardcomp.checkpoint.run_state import Stored
from shardcomp.errors import VerifyError
from shardcomp.materialize import shard
from shardcomp.policy import Policy
from shardcomp.policy.options import flags
from shardcomp.runtime.optimizer import AdamW
from shardcomp.training.sample_stream import SampleStream, digest_text
from shardcomp.verification.verifier import FLOOR, TOLERANCE, small_config

SAMPLES, LENGTH = 64, 24
MAX_PROCESSES = 8
PATIENCE = 600.0
"""Seconds after which ranks that say nothing are taken to hang."""


@dataclass(frozen=True)
class _Job:
    """What every rank of a run does."""

    config: str
    policy: Policy
    world: int
    batch: int
    length: int
    steps: int
    folder: str
    start: str | None = None


@dataclass
class ResumeCheck:
    """The answer.

    steps: how many a run has; killed_after: the last step before the kill; within_save: whether a save was under way;
    resumed_from: the step of the checkpoint that it went on from. losses_equal, files_equal: every loss, norm and batch, and
    every byte of the last checkpoint, are those of the undisturbed run. onto: for another topology its plan, the deviations of
    losses and weights, the tolerance, and `ok`.
    """

    ok: bool
    steps: int
    killed_after: int
    within_save: bool
    resumed_from: int
    losses_equal: bool
    files_equal: bool
    reproduce: str
    onto: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def resume_check(
    model_or_config: Any,
    policy: Policy,
    world_size: int | None = None,
    *,
    onto: Policy | None = None,
    onto_world: int | None = None,
    steps: int = 8,
    shrink: dict[str, Any] | None = None,
    seed: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> ResumeCheck:
    """Train `steps` steps of a small model of the same structure; train them again, with SIGKILL for every rank at a drawn
    moment, and let that run go on; compare. `shrink` as in `verify`.

    onto: a second plan, of the same model, that goes on from a checkpoint in the middle of the undisturbed run: its losses,
    and in float64 its weights, must agree within the tolerance of `verify`. seed: of the moment. Raises VerifyError where the
    ranks fail, or where there are more than this machine should start.
    """
    plans = [(policy, policy.mesh(world_size or policy.options.ranks))]
    if onto is not None:
        if policy.options.precision not in TOLERANCE or onto.options.precision != policy.options.precision:
            raise VerifyError(
                f"precision = {policy.options.precision}, and {onto.options.precision} for the other topology: whether two "
                f"topologies agree can be told where both have the same of {' and '.join(TOLERANCE)}"
            )
        plans.append((onto, onto.mesh(onto_world or onto.options.ranks)))
    for _, mesh in plans:
        if mesh.world_size > MAX_PROCESSES:
            raise VerifyError(f"{mesh.world_size} ranks: resume-check starts at most {MAX_PROCESSES} processes")
    if steps < 4:
        raise VerifyError(f"steps = {steps}: give 4 or more, so that there is something before the kill and after it")
    config, name = small_config(model_or_config, [(plan, mesh.world_size) for plan, mesh in plans], shrink or {}, progress)
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="shardcomp-resume-") as scratch:
        root = Path(scratch)
        config.save_pretrained(root / "model")
        micro = max(plan.options.micro_batch or 1 for plan, _ in plans)
        batch = math.lcm(*(mesh.dp for _, mesh in plans)) * micro * 2
        tensor = math.lcm(*(mesh.tp for _, mesh in plans))
        length = -(-LENGTH // tensor) * tensor

        def job(number: int, folder: str, start: Path | None = None) -> _Job:
            plan, mesh = plans[number]
            if not (shrink or {}).get("none"):
                plan = plan.replace(stage_layers=None)
            plan = plan.replace(micro_batch=plan.options.micro_batch or 1)
            where = str(root / folder)
            return _Job(str(root / "model"), plan, mesh.world_size, batch, length, steps, where, str(start) if start else None)

        progress("undisturbed")
        undisturbed = _Ranks(job(0, "undisturbed"))
        undisturbed.finish()
        progress("killed and resumed")
        killed = _Ranks(job(0, "killed"))
        after = draw.randrange(2, steps - 1)
        within = killed.kill_after(after, draw.random())
        last = max(killed.numbers(), default=0)
        killed.start()
        killed.finish()
        found = ResumeCheck(
            ok=False,
            steps=steps,
            killed_after=last,
            within_save=within,
            resumed_from=killed.resumed_from(),
            losses_equal=killed.numbers() == undisturbed.numbers(),
            files_equal=killed.last() == undisturbed.last(),
            reproduce=_command(name, plans, steps, shrink or {}),
        )
        if onto is not None:
            progress("onto the other topology")
            middle = undisturbed.checkpoints / directory.name_of(steps // 2)
            other = _Ranks(job(1, "onto", middle))
            other.finish()
            found.onto = _compare(undisturbed, other, onto)
        found.ok = found.losses_equal and found.files_equal and found.onto.get("ok", True)
        return found


class Trace:
    """What a run leaves in `folder`: its checkpoints, and a log with a JSON object a line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints, self.log = folder / "checkpoints", folder / "log.jsonl"

    def entries(self) -> Iterator[dict[str, Any]]:
        """The log's lines, but for one that a kill cut off or that is being written."""
        for line in self.log.read_text().splitlines() if self.log.exists() else ():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def numbers(self) -> dict[int, tuple[float, float, str]]:
        """Loss, norm and digest of each step, as it was done last."""
        return {each["step"]: (each["loss"], each["norm"], each["digest"]) for each in self.entries() if "loss" in each}

    def partials(self) -> list[str]:
        """Saves that are under way, or were cut off."""
        return sorted(path.name for path in self.checkpoints.glob(".step-*.partial"))

    def last(self) -> str:
        """The name and the sums of all files of the last checkpoint."""
        newest = directory.latest(self.checkpoints)
        return f"{newest.name}\n{(newest / directory.SUMS).read_text()}" if newest else ""


class _Ranks(Trace):
    """The processes of one run."""

    def __init__(self, job: _Job) -> None:
        super().__init__(Path(job.folder))
        self.job = job
        self.folder.mkdir()
        self.starts = 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        context = multiprocessing.get_context("spawn")
        store = str(self.folder / f"store-{self.starts}")
        self.processes = [
            context.Process(target=_rank, args=(self.job, rank, store), daemon=True) for rank in range(self.job.world)
        ]
        for process in self.processes:
            process.start()

    def finish(self) -> None:
        """Wait for the end. Raises VerifyError with a failed rank's words."""
        ends = time.monotonic() + PATIENCE
        while any(process.exitcode is None for process in self.processes) and time.monotonic() < ends:
            if any(process.exitcode for process in self.processes):
                break
            time.sleep(0.02)
        codes = [process.exitcode for process in self.processes]
        if any(code != 0 for code in codes):
            self.kill()
            words = [path.read_text() for path in sorted(self.folder.glob("failed-*.txt"))]
            raise VerifyError("\n".join(words) or f"the ranks ended with {codes}, where None did not end")

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def kill_after(self, step: int, share: float) -> bool:
        """SIGKILL for every rank at some moment after a step. Returns whether a save was under way."""
        ends = time.monotonic() + PATIENCE
        while max(self.numbers(), default=0) < step:
            if not all(process.is_alive() for process in self.processes) or time.monotonic() > ends:
                self.finish()
                raise VerifyError(f"the run ended before step {step}")
            time.sleep(0.001)
        time.sleep(share * 0.05)
        self.kill()
        return bool(self.partials())

    def resumed_from(self) -> int:
        return [each["start"] for each in self.entries() if "start" in each][-1]


def _rank(job: _Job, rank: int, store: str) -> None:
    """One process: a training script as a user would write it."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", store=dist.FileStore(store, job.world), rank=rank, world_size=job.world)
        _train(job, rank)
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        (Path(job.folder) / f"failed-{rank}.txt").write_text(f"rank {rank} failed:\n{traceback.format_exc()}")
        raise


def _train(job: _Job, rank: int) -> None:
    torch.manual_seed(rank)
    random.seed(rank)
    numpy.random.seed(rank)  # noqa: NPY002
    sharded = shard(presets.build(presets.config_of(job.config)), job.policy)
    optimizer = AdamW(sharded.parameters(), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 4))
    axis = sharded.mesh["dp"]
    vocabulary = int(sharded.config.get_text_config().vocab_size)
    samples = torch.randint(0, vocabulary, (SAMPLES, job.length), generator=torch.Generator().manual_seed(1))
    stream = SampleStream(samples, job.policy.options.seed, axis.get_local_rank(), axis.size())
    saver = Saver(Path(job.folder) / "checkpoints")
    found = saver.resume(sharded, optimizer, scheduler=scheduler, path=job.start)
    if found is not None:
        stream.load_state_dict(found.extra)

    def say(**entry: Any) -> None:
        if rank == 0:
            with open(Path(job.folder) / "log.jsonl", "a") as log:
                log.write("\n" + json.dumps(entry))

    start = found.step if found else 0
    say(start=start)
    for step in range(start + 1, job.steps + 1):
        tokens, mine = stream.next(job.batch // axis.size())
        result = sharded.train_step(input_ids=tokens, labels=tokens)
        norm = float(sharded.clip_grad_norm_(1.0))
        if sharded.optimizer_step(optimizer):
            scheduler.step()
        optimizer.zero_grad()
        total = torch.tensor([mine])
        dist.all_reduce(total, group=axis.get_group())
        say(step=step, loss=float(result.loss), norm=norm, digest=digest_text(int(total)))
        saver.save(sharded, optimizer, step=step, scheduler=scheduler, extra=stream.state_dict())
    saver.close()


def _compare(undisturbed: _Ranks, other: _Ranks, onto: Policy) -> dict[str, Any]:
    """How far the run on the other topology is from the undisturbed one."""
    tolerance = TOLERANCE[onto.options.precision]
    mine, theirs = undisturbed.numbers(), other.numbers()
    losses = max(abs(theirs[step][0] - mine[step][0]) / abs(mine[step][0]) for step in theirs)
    batches = all(theirs[step][2] == mine[step][2] for step in theirs)
    found: dict[str, Any] = {
        "plan": onto.options.as_dict(),
        "from_step": other.resumed_from(),
        "batches_equal": batches,
        "losses": losses,
        "tolerance": tolerance,
    }
    ok = batches and losses <= tolerance
    if onto.options.precision == "fp64":
        ends = [directory.latest(each.checkpoints) for each in (undisturbed, other)]
        exact, held = (Stored(path, directory.read_manifest(path)) for path in ends if path)
        # A gradient that is zero but for rounding becomes a step of full size in AdamW.
        sizes = {name: float(_squares(exact, name)) for name in exact.packed}
        floor = FLOOR**2 * sum(sizes.values())
        deviations = {
            name: float((held.original(name) - exact.original(name)).norm() / exact.original(name).norm())
            for name, size in sizes.items()
            if size > floor
        }
        found["weights"] = max(deviations.values())
        ok = ok and found["weights"] <= tolerance
    return {**found, "ok": ok}


def _squares(stored: Any, name: str) -> torch.Tensor:
    """The mean squares of a tensor's gradients, added up."""
    keys = [f"optimizer/{each}/exp_avg_sq" for each in stored.packed[name]]
    return sum((stored.whole(key).sum() for key in keys if key in stored), torch.zeros(()))


def _command(name: str, plans: list[Any], steps: int, shrink: dict[str, Any]) -> str:
    words = ["shardcomp", "resume-check", name, *_flags(*plans[0]), "--steps", str(steps)]
    words += [word for key, held in shrink.items() for word in ("--shrink", "none" if key == "none" else f"{key}={held}")]
    if len(plans) > 1:
        words += ["--onto", " ".join(_flags(*plans[1]))]
    return shlex.join(words)


def _flags(policy: Policy, mesh: Any) -> list[str]:
    asked = {key: held for key, held in policy.options.as_dict().items() if held is not None and key != "data"}
    return ["--world", str(mesh.world_size), "--policy", policy.name, *flags(asked)]
