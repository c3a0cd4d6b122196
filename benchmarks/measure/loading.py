"""What one rank of four reads and holds while it loads a checkpoint of about 1 GB: `python benchmarks/measure/loading.py`.

The checkpoint has random weights and is written for the measurement. A fresh process then lowers the model on meta and reads
the parameters of rank 0 as `shard(checkpoint=...)` does, without a process group. Linux only: it reads /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

import shardcomp
from shardcomp import presets
from shardcomp.materialize import weights_of
from shardcomp.runtime.allocation import local_index

TENSOR = 4
SHARD = 256 * 2**20
CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=9,
    num_attention_heads=16,
    num_key_value_heads=8,
    tie_word_embeddings=False,
)


def write(directory: Path) -> None:
    """A checkpoint in bfloat16, of which no more than one file is held."""
    where: dict[str, str] = {}
    for number, names in enumerate(_shards(), 1):
        file = f"model-{number:05d}.safetensors"
        shapes = {name: shape for name, shape in _shapes().items() if name in names}
        save_file({name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}, directory / file)
        where |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    CONFIG.save_pretrained(directory)


def _shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in presets.build(CONFIG).named_parameters()}


def _shards() -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, shape in _shapes().items():
        nbytes = 2 * torch.Size(shape).numel()
        if names and held + nbytes > SHARD:
            yield names
            names, held = [], 0
        names.append(name)
        held += nbytes
    yield names


def load(directory: Path) -> dict[str, float]:
    """Read the parameters of rank 0 and tell what that took."""
    lowered = shardcomp.lower(presets.build(CONFIG), shardcomp.Policy.load("llama", tensor=TENSOR), TENSOR, seq=64)
    plans, mesh = lowered.blueprint().parameters, lowered.mesh
    weights = weights_of(lowered, directory)
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
    resident, read, start = _resident(), _read(), time.perf_counter()
    file = 0
    held = {}
    for name, plan in plans.items():
        held[name] = weights(name, local_index(plan, mesh, dict.fromkeys(("pp", "dp", "cp", "tp"), 0)))
        file = max(file, _resident()["RssFile"] - resident["RssFile"])
    seconds = time.perf_counter() - start
    now = _resident()
    return {
        "parameters": sum(tensor.nbytes for tensor in held.values()),
        "asked": sum(2 * tensor.numel() for tensor in held.values()),
        "disk": _read() - read,
        "peak": now["VmHWM"] - resident["VmRSS"],
        "anonymous": now["RssAnon"] - resident["RssAnon"],
        "mapped": file,
        "seconds": seconds,
    }


def _resident() -> dict[str, int]:
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[0].startswith(("VmHWM", "VmRSS", "Rss"))}


def _read() -> int:
    """Bytes that this process had fetched from the disk, read-ahead included."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def _forget(directory: Path) -> None:
    """Drop the files from the page cache, so that reading them means reading the disk."""
    for path in directory.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _fresh(directory: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--load", str(directory)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--load", type=Path, help="only load this directory, and print what that took")
    parser.add_argument("--scratch", type=Path, help="where to write the checkpoint, by default the temporary directory")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.load:
        print(json.dumps(load(arguments.load)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        directory = Path(scratch)
        write(directory)
        total = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
        _forget(directory)
        cold = _fresh(directory)
        warm = _fresh(directory)
    rows = {
        "files, bfloat16": ("", total, total),
        "asked for by rank 0": ("asked", cold["asked"], warm["asked"]),
        "read from the disk": ("disk", cold["disk"], warm["disk"]),
        "rank 0's parameters, float32": ("", cold["parameters"], warm["parameters"]),
        "resident memory, peak growth": ("", cold["peak"], warm["peak"]),
        "  of it its own (RssAnon at the end)": ("", cold["anonymous"], warm["anonymous"]),
        "  of it mapped files (most seen)": ("", cold["mapped"], warm["mapped"]),
    }
    print(f"{'tensor = ' + str(TENSOR):38} {'cold cache':>16} {'warm cache':>16}")
    for what, (key, *found) in rows.items():
        cells = [f"{size / 2**20:8.1f} MiB" + (f" {size / total:4.0%}" if key else "") for size in found]
        print(f"{what:38} " + " ".join(f"{cell:>17}" for cell in cells))
    print(f"{'seconds':38} {cold['seconds']:15.2f} s {warm['seconds']:14.2f} s")


if __name__ == "__main__":
    main()
