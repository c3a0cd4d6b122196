"""Kill a run of the driver again and again.

    python benchmarks/measure/kills.py [--kills 30] [--inside 10] [--plan "--tensor 2"] [--ranks 2] [--seed 0]

Every process of the run gets SIGKILL at a random moment, in a step or within a save. Then the same command resumes it. At the
end every loss, norm and batch, and every byte of the last checkpoint (weights, optimizer, generators), must be those of an
undisturbed run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from shardcomp.verification.resumption import Trace

ROOT = Path(__file__).parents[2]
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@dataclass
class Kill:
    """One kill: the last step before it, the hidden directory of a checkpoint that was being written, and the step that the
    run then resumed from."""

    step: int
    partial: str
    resumed: int | None = None


@dataclass
class Result:
    """The kills, and whether the run ended as the undisturbed one did."""

    kills: list[Kill]
    losses_equal: bool
    files_equal: bool

    @property
    def ok(self) -> bool:
        return self.losses_equal and self.files_equal


class Job(Trace):
    """A run of the driver under torchrun, in a directory of its own."""

    def __init__(self, folder: Path, steps: int, plan: str, ranks: int) -> None:
        super().__init__(folder)
        self.steps, self.plan, self.ranks = steps, plan, ranks
        folder.mkdir(parents=True, exist_ok=True)
        self.config, self.text = folder.parent / "config.json", folder.parent / "text.txt"
        self.config.write_text(json.dumps(CONFIG))
        self.text.write_bytes(b"".join(b"%d bottles of beer on the wall\n" % n for n in range(4000)))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        """Start the run or resume it: the command is the same, with `more` at its end."""
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks)]
        words += [str(ROOT / "examples/llama/pretrain.py"), "-c", str(self.config)]
        words += ["-d", str(self.text), "-l", "64", "-b", "4", "--steps", str(self.steps), "--warmup", "3"]
        words += ["--lr", "1e-2", "--precision", "fp32", *shlex.split(self.plan)]
        words += ["--checkpoint-dir", str(self.checkpoints), "--save-interval", "2", "--keep", "2"]
        words += ["--log-file", str(self.log), *more]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open(self.folder / "output.txt", "ab") as output:
            self.process = subprocess.Popen(words, stdout=output, stderr=output, env=environment, start_new_session=True)

    def wait(self) -> None:
        """Wait until the run ends by itself. Raises RuntimeError if it fails."""
        assert self.process is not None
        if self.process.wait(600):
            raise RuntimeError(f"the run failed:\n{self.output()[-3000:]}")

    def until(self, condition: Callable[[], bool], patience: float = 300.0) -> bool:
        """Wait for a condition. Returns whether it was true before the run ended."""
        assert self.process is not None
        deadline = time.monotonic() + patience
        while not condition():
            if self.process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing happens:\n{self.output()[-3000:]}")
            time.sleep(0.0005)
        return True

    def output(self) -> str:
        """What the run has printed."""
        return (self.folder / "output.txt").read_text()

    def ranks_of(self) -> list[int]:
        """The processes of the ranks, in the order of the ranks."""
        assert self.process is not None
        processes = {}
        for process in descendants(self.process.pid):
            words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
            environment = {word.partition(b"=")[0]: word.partition(b"=")[2] for word in words}
            if b"LOCAL_RANK" in environment:
                processes[int(environment[b"RANK"])] = process
        return [processes[rank] for rank in sorted(processes)]

    def kill(self) -> None:
        """Send SIGKILL to the launcher and all ranks."""
        assert self.process is not None
        for process in reversed([self.process.pid, *descendants(self.process.pid)]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self.process.wait()


def descendants(process: int) -> list[int]:
    """The children of a process, their children, and so on."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents.setdefault(int(path.read_text().rpartition(")")[2].split()[1]), []).append(int(path.parent.name))
        except OSError:
            continue
    result, left = [], [process]
    while left:
        children = parents.get(left.pop(), [])
        result += children
        left += children
    return result


def measure(folder: Path, kills: int, inside: int, plan: str, ranks: int, seed: int, say: Callable[[str], None]) -> Result:
    """Run the driver undisturbed, and run it with `kills` kills, of which at least `inside` are within a save."""
    draw = random.Random(seed)
    steps = 6 * kills + 4
    undisturbed = Job(folder / "undisturbed", steps, plan, ranks)
    undisturbed.start()
    undisturbed.wait()
    job = Job(folder / "killed", steps, plan, ranks)
    killed: list[Kill] = []
    job.start()
    while len(killed) < kills:
        began = len(list(job.entries()))
        started = job.until(lambda: len(list(job.entries())) > began)  # noqa: B023
        first = list(job.entries())[began] if started else {}
        if killed and started:
            killed[-1].resumed = first["step"]
        missing = inside - sum(bool(kill.partial) for kill in killed)
        within = kills - len(killed) <= missing or draw.random() < 0.5
        more = draw.randrange(5)
        alive = job.until(lambda: sum("loss" in entry for entry in list(job.entries())[began:]) >= more)  # noqa: B023
        if within:
            alive = alive and job.until(lambda: bool(job.partials()))
            time.sleep(draw.random() * 0.004)
        else:
            time.sleep(draw.random() * 0.2)
        if not alive:
            raise RuntimeError(f"the run ended after {len(killed)} kills")
        job.kill()
        killed.append(Kill(max(job.numbers(), default=0), ", ".join(job.partials())))
        say(f"kill {len(killed)} of {kills}: after step {killed[-1].step}, {killed[-1].partial or 'between saves'}")
        job.start()
    began = len(list(job.entries()))
    job.until(lambda: len(list(job.entries())) > began)
    killed[-1].resumed = list(job.entries())[began]["step"]
    job.wait()
    return Result(killed, job.numbers() == undisturbed.numbers(), job.last() == undisturbed.last())


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--inside", type=int, default=10, help="how many of them, at least, are within a save")
    parser.add_argument("--plan", default="--tensor 2", help="the driver's flags of the plan")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(
            Path(folder), args.kills, args.inside, args.plan, args.ranks, args.seed, lambda line: print(line, flush=True)
        )
    table = Table("kill", "after step", "within a save", "resumed from step")
    for number, kill in enumerate(result.kills, 1):
        table.add_row(str(number), str(kill.step), kill.partial or "no", str(kill.resumed))
    console.print(table)
    inside = sum(bool(kill.partial) for kill in result.kills)
    console.print(f"{len(result.kills)} kills, {inside} of them within a save")
    console.print(f"losses, norms and batches equal bit for bit: {'yes' if result.losses_equal else 'NO'}")
    console.print(f"all files of the last checkpoint equal: {'yes' if result.files_equal else 'NO'}")
    return 0 if result.ok else 1


if __name__ == "__main__":
    sys.exit(main())
