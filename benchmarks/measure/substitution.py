"""How many results of the kernels in a model have the bits of the subgraphs that they replace, and how far off the others are.

linear_cross_entropy is left out: its result is one number, whose last bit depends on the order of a sum.

    PYTHONPATH=.:tests .venv/bin/python benchmarks/measure/substitution.py [--dtype bf16 ...] [KIND ...]

There is a line for every kernel, model and dtype: how many subgraphs were replaced, the share of equal bits, and the largest
distance in units in the last place.
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

    def rank(tensor: Tensor) -> Tensor:
        """The number of each value among all values of the dtype, in order."""
        bits = tensor.contiguous().view(_BITS[tensor.dtype]).to(torch.int64)
        return torch.where(bits < 0, torch.iinfo(_BITS[tensor.dtype]).min - bits, bits)

    return int((rank(a) - rank(b)).abs().max()) if a.numel() else 0


def compared(kind: str, precision: str) -> dict[str, tuple[int, float, int]]:
    """Kernel -> how many distinct subgraphs, the smallest share of equal bits, the largest distance."""
    rows: dict[str, tuple[int, float, int]] = {}
    true_replace = fuse_kernels._replace

    def replace(body: Any, subgraph: Subgraph, replacement: Replacement) -> None:
        if replacement.function is not linear_cross_entropy:
            inputs, expected = _Trials(subgraph).own()
            pairs = list(zip(replacement.run(inputs), expected, strict=True))
            share, distance = min(equal_bits(a, b) for a, b in pairs), max(ulps(a, b) for a, b in pairs)
            count, least, most = rows.get(replacement.name, (0, 1.0, 0))
            rows[replacement.name] = count + 1, min(least, share), max(most, distance)
        true_replace(body, subgraph, replacement)

    fuse_kernels._replace = replace
    try:
        shardcomp.lower(tiny_config(kind), shardcomp.Policy.load("auto", precision=precision), seq=16)
    finally:
        fuse_kernels._replace = true_replace
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(families())} (default: those of the gate)")
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp16", "fp32"], help="precisions (default: bf16 fp16 fp32)")
    args = parser.parse_args()
    print(f"{'kernel':14} {'model':14} {'dtype':6} {'subgraphs':>9} {'equal bits':>11} {'largest ulp':>12}")
    for kind in args.kinds or [name for name in families() if name in GATE]:
        for precision in args.dtype:
            for name, (count, share, distance) in compared(kind, precision).items():
                print(f"{name:14} {kind:14} {precision:6} {count:9} {share:11.4%} {distance:12}", flush=True)


if __name__ == "__main__":
    main()
