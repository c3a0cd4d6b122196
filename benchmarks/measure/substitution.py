"""How many results of the kernels that are put into a model have the bits of what they replace, and how far off the others are.
linear_cross_entropy is left out: one number, whose last bit is the order of a sum.

    PYTHONPATH=.:tests .venv/bin/python benchmarks/measure/substitution.py [--dtype bf16 ...] [KIND ...]

A line for each kernel, model and dtype: the pieces that were replaced, the share of equal bits, and the largest distance in
units in the last place.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import shardcomp
from shardcomp.fusion.equivalence import Replacement, Subgraph, _Trials, equal_bits
from shardcomp.kernels import linear_cross_entropy
from shardcomp.passes import fuse_kernels
from support.families import GATE, families, tiny_config

_BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def ulps(a: Tensor, b: Tensor) -> int:
    """The largest number of values of the dtype that lie between two results."""

    def place(held: Tensor) -> Tensor:
        bits = held.contiguous().view(_BITS[held.dtype]).to(torch.int64)
        return torch.where(bits < 0, torch.iinfo(_BITS[held.dtype]).min - bits, bits)

    return int((place(a) - place(b)).abs().max()) if a.numel() else 0


def compared(kind: str, precision: str) -> dict[str, tuple[int, float, int]]:
    """Kernel -> distinct pieces, the smallest share of equal bits, the largest distance."""
    found: dict[str, tuple[int, float, int]] = {}
    true = fuse_kernels._replace

    def replace(body: Any, piece: Subgraph, proposal: Replacement) -> None:
        if proposal.function is not linear_cross_entropy:
            given, expected = _Trials(piece).own()
            made = proposal.run(given)
            pairs = list(zip(made, expected, strict=True))
            share, apart = min(equal_bits(a, b) for a, b in pairs), max(ulps(a, b) for a, b in pairs)
            count, least, most = found.get(proposal.name, (0, 1.0, 0))
            found[proposal.name] = count + 1, min(least, share), max(most, apart)
        true(body, piece, proposal)

    fuse_kernels._replace = replace
    try:
        shardcomp.lower(tiny_config(kind), shardcomp.Policy.load("auto", precision=precision), seq=16)
    finally:
        fuse_kernels._replace = true
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(families())} (default: those of the gate)")
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp16", "fp32"], help="precisions (default: bf16 fp16 fp32)")
    asked = parser.parse_args()
    print(f"{'kernel':14} {'model':14} {'dtype':6} {'pieces':>6} {'equal bits':>11} {'largest ulp':>12}")
    for kind in asked.kinds or [name for name in families() if name in GATE]:
        for precision in asked.dtype:
            for name, (count, share, apart) in compared(kind, precision).items():
                print(f"{name:14} {kind:14} {precision:6} {count:6} {share:11.4%} {apart:12}", flush=True)


if __name__ == "__main__":
    main()
