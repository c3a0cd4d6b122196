"""A checkpoint as a HuggingFace directory, without a GPU or a process group, one file of it in memory at a time."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from shardcomp import presets
from shardcomp.checkpoint import directory
from shardcomp.checkpoint.stored import Stored
from shardcomp.errors import CheckpointError
from shardcomp.weights.huggingface import Entry, save_pretrained


def convert(
    checkpoint: str | Path,
    destination: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_size: int = 5 * 10**9,
) -> Path:
    """Write the weights of a checkpoint as transformers' `from_pretrained` loads them, after every byte of it is checked.

    Args:
        checkpoint: its directory, or a run's directory, whose newest is taken.
        destination: the directory to write.
        dtype: of floating-point weights; None for the one they were trained in.
        max_shard_size: bytes of a file.

    Returns:
        The path of the checkpoint.

    Raises:
        CheckpointError: where it is damaged, or has no HuggingFace configuration; where nothing can be written.
    """
    path = Path(checkpoint).expanduser().absolute()
    if not (path / directory.SUMS).exists():
        path = directory.latest(path) or path
    manifest = directory.read_manifest(path)
    sums = directory.read_sums(path)
    directory.check(path, sums, sums)
    if directory.CONFIG not in sums:
        raise CheckpointError(f"{path} was saved of a model without a HuggingFace configuration: it cannot be exported")
    stored = Stored(path, manifest)
    names = list(stored.packed) + list(manifest["buffers"])
    aliases = {} if manifest["tied_by_configuration"] else {a: n for n, others in manifest["aliases"].items() for a in others}

    def entry(name: str, source: str) -> Entry:
        part = source in stored.packed
        key = f"model/{stored.packed[source][0] if part else source}"
        saved = stored.dtype(key)
        target = dtype if dtype is not None and saved.is_floating_point else saved
        shape = stored.original_shape(source) if part else stored.shape(key)

        def fetch() -> Tensor:
            return (stored.original(source) if part else stored.full(key)).to(target)

        return name, shape, target, fetch

    entries = [entry(name, name) for name in names] + [entry(alias, name) for alias, name in aliases.items()]
    config = presets.config_of(str(path))
    save_pretrained(destination, entries, config, is_writer=True, max_shard_size=max_shard_size)
    return path
