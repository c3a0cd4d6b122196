"""Measure what one rank of four reads, and how much memory it takes, while it loads a checkpoint of about 1 GB.

    python benchmarks/measure/loading.py [--scratch DIRECTORY]

The checkpoint has random weights and is written for the measurement. A fresh process then lowers the model on meta, and reads
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
    """Write a checkpoint in bfloat16, one file after the other, so that no more than one is in memory."""
    file_of: dict[str, str] = {}
    for number, names in enumerate(_shards(), 1):
        file = f"model-{number:05d}.safetensors"
        shapes = {name: shape for name, shape in _shapes().items() if name in names}
        save_file({name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}, directory / file)
        file_of |= dict.fromkeys(names, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": file_of}))
    CONFIG.save_pretrained(directory)


def _shapes() -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in presets.build(CONFIG).named_parameters()}


def _shards() -> Iterator[list[str]]:
    """The names of the weights of every file."""
    names: list[str] = []
    size = 0
    for name, shape in _shapes().items():
        nbytes = 2 * torch.Size(shape).numel()
        if names and size + nbytes > SHARD:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes
    yield names


def load(directory: Path) -> dict[str, float]:
    """Read the parameters of rank 0. Returns the bytes that this took, and the seconds."""
    lowered = shardcomp.lower(presets.build(CONFIG), shardcomp.Policy.load("llama", tensor=TENSOR), TENSOR, seq=64)
    plans, mesh = lowered.blueprint().parameters, lowered.mesh
    weights = weights_of(lowered, directory)
    Path("/proc/self/clear_refs").write_text("5")  # forget the largest size so far
    resident, read, start = _resident(), _read(), time.perf_counter()
    mapped = 0
    params = {}
    for name, plan in plans.items():
        params[name] = weights(name, local_index(plan, mesh, dict.fromkeys(("pp", "dp", "cp", "tp"), 0)))
        mapped = max(mapped, _resident()["RssFile"] - resident["RssFile"])
    seconds = time.perf_counter() - start
    now = _resident()
    return {
        "parameters": sum(tensor.nbytes for tensor in params.values()),
        "asked": sum(2 * tensor.numel() for tensor in params.values()),
        "disk": _read() - read,
        "peak": now["VmHWM"] - resident["VmRSS"],
        "anonymous": now["RssAnon"] - resident["RssAnon"],
        "mapped": mapped,
        "seconds": seconds,
    }


def _resident() -> dict[str, int]:
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if words[0].startswith(("VmHWM", "VmRSS", "Rss"))}


def _read() -> int:
    """Bytes that were read from the disk for this process, read-ahead included."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def _forget(directory: Path) -> None:
    """Drop the files from the page cache, so that they are read from the disk."""
    for path in directory.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _load_in_a_fresh_process(directory: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--load", str(directory)]
    result: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        cold = _load_in_a_fresh_process(directory)
        warm = _load_in_a_fresh_process(directory)
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
    for what, (key, *sizes) in rows.items():
        cells = [f"{size / 2**20:8.1f} MiB" + (f" {size / total:4.0%}" if key else "") for size in sizes]
        print(f"{what:38} " + " ".join(f"{cell:>17}" for cell in cells))
    print(f"{'seconds':38} {cold['seconds']:15.2f} s {warm['seconds']:14.2f} s")


if __name__ == "__main__":
    main()
