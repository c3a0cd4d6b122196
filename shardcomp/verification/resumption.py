"""`resume_check()`: a run of a plan is killed and resumed, and must end with the same bits as an undisturbed run.

The ranks are processes on this machine's CPU, over gloo. They train as a user's script would, with `shardcomp.checkpoint`.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import shlex
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import numpy
import torch
import torch.distributed as dist

from shardcomp import presets
from shardcomp.checkpoint import Saver, directory
from shardcomp.checkpoint.stored import Stored
from shardcomp.errors import VerifyError
from shardcomp.materialize import shard
from shardcomp.policy import Policy
from shardcomp.policy.options import flags
from shardcomp.runtime.optimizer import AdamW
from shardcomp.training.sample_stream import SampleStream, digest_text
from shardcomp.verification.compare import FLOOR, TOLERANCE
from shardcomp.verification.verifier import small_config

SAMPLES, LENGTH = 64, 24
MAX_PROCESSES = 8
PATIENCE = 600.0
"""Seconds after which ranks that write nothing are taken to hang."""


@dataclass(frozen=True)
class _Job:
    """What every rank of a run does.

    config: the directory of the model's configuration. batch: rows of the global batch. folder: where checkpoints and log go.
    start: the checkpoint to start from, of another run.
    """

    config: str
    policy: Policy
    world: int
    batch: int
    length: int
    steps: int
    folder: str
    start: str | None = None


class OntoCheck(TypedDict, total=False):
    """How a run that resumes on another topology compares with the undisturbed one. Empty where there is no other topology."""

    plan: dict[str, Any]
    """The options of the other topology."""
    from_step: int
    """The step of the checkpoint that it resumes from."""
    batches_equal: bool
    losses: float
    """The largest relative deviation of a loss."""
    tolerance: float
    weights: float
    """The largest relative deviation of a weight at the end. In float64 only."""
    ok: bool


@dataclass
class ResumeCheck:
    """The answer of `resume_check`, and what `shardcomp resume-check --json` prints."""

    ok: bool
    steps: int
    """How many steps a run has."""
    killed_after: int
    """The last step before the kill."""
    within_save: bool
    """Whether a checkpoint was being written when the run was killed."""
    resumed_from: int
    """The step of the checkpoint that the run resumed from."""
    losses_equal: bool
    """Whether every loss, norm and batch equals the undisturbed run's, bit for bit."""
    files_equal: bool
    """Whether every byte of the last checkpoint equals the undisturbed run's."""
    reproduce: str
    """The command line that runs this check again."""
    onto: OntoCheck = field(default_factory=OntoCheck)

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
    """Train a small model of the same structure twice, kill the second run and resume it, and compare the two.

    Every rank of the second run gets SIGKILL at a moment that is drawn.

    Args:
        model_or_config: a preset, a HuggingFace configuration, or its directory.
        policy: the plan.
        world_size: how many ranks; by default as many as the policy's degrees make. Each is a process.
        onto: a second plan that resumes from a checkpoint in the middle of the undisturbed run. Its losses, and in float64 its
            weights, must agree within the tolerance of `verify`.
        onto_world: how many ranks the second plan has.
        steps: how many steps a run has.
        shrink: as in `verify`.
        seed: of the moment of the kill. None draws another one every time.
        progress: called with a few words when a run begins.

    Raises:
        VerifyError: the ranks fail, or there are more than this machine should start.
        ShardError: a plan is not legal.

    Example:
        >>> answer = resume_check("tiny", Policy.load("llama", tensor=2), steps=6)  # doctest: +SKIP
        >>> answer.ok, answer.losses_equal, answer.files_equal  # doctest: +SKIP
        (True, True, True)
    """
    plans = [(policy, policy.mesh(world_size or policy.options.ranks))]
    if onto is not None:
        if policy.options.precision not in TOLERANCE or onto.options.precision != policy.options.precision:
            raise VerifyError(
                f"precision = {policy.options.precision}, and {onto.options.precision} for the other topology: two topologies "
                f"can be compared if both have the same precision, of {' and '.join(TOLERANCE)}"
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

        def job(index: int, name: str, start: Path | None = None) -> _Job:
            plan, mesh = plans[index]
            if not (shrink or {}).get("none"):
                plan = plan.replace(stage_layers=None)
            plan = plan.replace(micro_batch=plan.options.micro_batch or 1)
            folder = str(root / name)
            return _Job(str(root / "model"), plan, mesh.world_size, batch, length, steps, folder, str(start) if start else None)

        progress("undisturbed")
        undisturbed = _Ranks(job(0, "undisturbed"))
        undisturbed.finish()
        progress("killed and resumed")
        killed = _Ranks(job(0, "killed"))
        within_save = killed.kill_after(draw.randrange(2, steps - 1), draw.random())
        last_step = max(killed.numbers(), default=0)
        killed.start()
        killed.finish()
        answer = ResumeCheck(
            ok=False,
            steps=steps,
            killed_after=last_step,
            within_save=within_save,
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
            answer.onto = _compare(undisturbed, other, onto)
        answer.ok = answer.losses_equal and answer.files_equal and answer.onto.get("ok", True)
        return answer


class Trace:
    """What a run leaves in `folder`: its checkpoints, and a log of one JSON object a line."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints, self.log = folder / "checkpoints", folder / "log.jsonl"

    def entries(self) -> Iterator[dict[str, Any]]:
        """The lines of the log, without one that a kill cut off or that is being written."""
        for line in self.log.read_text().splitlines() if self.log.exists() else ():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def numbers(self) -> dict[int, tuple[float, float, str]]:
        """Step -> its loss, norm and digest of samples. A step that ran twice has the values of its last run."""
        steps = (entry for entry in self.entries() if "loss" in entry)
        return {step["step"]: (step["loss"], step["norm"], step["digest"]) for step in steps}

    def partials(self) -> list[str]:
        """The directories of checkpoints that are being written, or whose writing was cut off."""
        return sorted(path.name for path in self.checkpoints.glob(".step-*.partial"))

    def last(self) -> str:
        """The name of the last checkpoint, and the checksums of its files."""
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
        # Of a server that has imported torch and transformers once. No thread of this process is forked.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        store = str(self.folder / f"store-{self.starts}")
        self.processes = [
            context.Process(target=_rank, args=(self.job, rank, store, dict(os.environ)), daemon=True)
            for rank in range(self.job.world)
        ]
        for process in self.processes:
            process.start()

    def finish(self) -> None:
        """Wait for the end. Raises VerifyError with the traceback of a rank that failed."""
        deadline = time.monotonic() + PATIENCE
        while any(process.exitcode is None for process in self.processes) and time.monotonic() < deadline:
            if any(process.exitcode for process in self.processes):
                break
            time.sleep(0.02)
        codes = [process.exitcode for process in self.processes]
        if any(code != 0 for code in codes):
            self.kill()
            tracebacks = [path.read_text() for path in sorted(self.folder.glob("failed-*.txt"))]
            raise VerifyError("\n".join(tracebacks) or f"the ranks ended with {codes}, where None did not end")

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def kill_after(self, step: int, share: float) -> bool:
        """Send SIGKILL to every rank at some moment after a step. Returns whether a checkpoint was being written."""
        deadline = time.monotonic() + PATIENCE
        while max(self.numbers(), default=0) < step:
            if not all(process.is_alive() for process in self.processes) or time.monotonic() > deadline:
                self.finish()
                raise VerifyError(f"the run ended before step {step}")
            time.sleep(0.001)
        time.sleep(share * 0.05)
        self.kill()
        return bool(self.partials())

    def resumed_from(self) -> int:
        """The step that the last start began after."""
        return [entry["start"] for entry in self.entries() if "start" in entry][-1]


def _rank(job: _Job, rank: int, store: str, environment: dict[str, str]) -> None:
    """One process: a training script as a user would write it."""
    os.environ.clear()  # the server that this process was forked from may be older than a variable
    os.environ.update(environment)
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
    resumed = saver.resume(sharded, optimizer, scheduler=scheduler, path=job.start)
    if resumed is not None:
        stream.load_state_dict(resumed.extra)

    def write(**entry: Any) -> None:
        if rank == 0:
            with open(Path(job.folder) / "log.jsonl", "a") as log:
                log.write("\n" + json.dumps(entry))  # first the newline: it ends a line that a kill cut off

    start = resumed.step if resumed else 0
    write(start=start)
    for step in range(start + 1, job.steps + 1):
        tokens, digest = stream.next(job.batch // axis.size())
        result = sharded.train_step(input_ids=tokens, labels=tokens)
        norm = float(sharded.clip_grad_norm_(1.0))
        if sharded.optimizer_step(optimizer):
            scheduler.step()
        optimizer.zero_grad()
        batch_digest = torch.tensor([digest])
        dist.all_reduce(batch_digest, group=axis.get_group())
        write(step=step, loss=float(result.loss), norm=norm, digest=digest_text(int(batch_digest)))
        saver.save(sharded, optimizer, step=step, scheduler=scheduler, extra=stream.state_dict())
    saver.close()


def _compare(undisturbed: _Ranks, other: _Ranks, onto: Policy) -> OntoCheck:
    """How far the run on the other topology is from the undisturbed one."""
    tolerance = TOLERANCE[onto.options.precision]
    exact, numbers = undisturbed.numbers(), other.numbers()
    losses = max(abs(loss - exact[step][0]) / abs(exact[step][0]) for step, (loss, _, _) in numbers.items())
    batches_equal = all(digest == exact[step][2] for step, (_, _, digest) in numbers.items())
    check: OntoCheck = {
        "plan": onto.options.as_dict(),
        "from_step": other.resumed_from(),
        "batches_equal": batches_equal,
        "losses": losses,
        "tolerance": tolerance,
    }
    ok = batches_equal and losses <= tolerance
    if onto.options.precision == "fp64":
        check["weights"] = _weight_deviation(undisturbed, other)
        ok = ok and check["weights"] <= tolerance
    check["ok"] = ok
    return check


def _weight_deviation(undisturbed: _Ranks, other: _Ranks) -> float:
    """The largest relative deviation of a weight at the end."""
    paths = [directory.latest(run.checkpoints) for run in (undisturbed, other)]
    exact, stored = (Stored(path, directory.read_manifest(path)) for path in paths if path)
    # A gradient that is zero but for rounding becomes a step of full size in AdamW. Its weight is not compared.
    squares = {name: float(_mean_squares(exact, name)) for name in exact.packed}
    floor = FLOOR**2 * sum(squares.values())
    return max(
        float((stored.original(name) - exact.original(name)).norm() / exact.original(name).norm())
        for name, square in squares.items()
        if square > floor
    )


def _mean_squares(stored: Any, name: str) -> torch.Tensor:
    """AdamW's mean squares of a tensor's gradients, added up over its elements."""
    keys = [f"optimizer/{slice_name}/exp_avg_sq" for slice_name in stored.packed[name]]
    return sum((stored.full(key).sum() for key in keys if key in stored), torch.zeros(()))


def _command(name: str, plans: list[Any], steps: int, shrink: dict[str, Any]) -> str:
    words = ["shardcomp", "resume-check", name, *_flags(*plans[0]), "--steps", str(steps)]
    words += [word for key, value in shrink.items() for word in ("--shrink", "none" if key == "none" else f"{key}={value}")]
    if len(plans) > 1:
        words += ["--onto", " ".join(_flags(*plans[1]))]
    return shlex.join(words)


def _flags(policy: Policy, mesh: Any) -> list[str]:
    asked = {key: value for key, value in policy.options.as_dict().items() if value is not None and key != "data"}
    return ["--world", str(mesh.world_size), "--policy", policy.name, *flags(asked)]
