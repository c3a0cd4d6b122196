"""Captured calls on disk, so that a model that was captured once on this machine need not be exported again.

An export takes seconds for a small model and minutes for a deep one, and gives the same graph for the same configuration, code
and versions. Only models whose code is all of transformers, torch and Python's library are kept. A file is found by a digest of
everything that an export reads; `captured` says what is in it. SHARDCOMP_CAPTURES=anew neither reads nor writes any, and
SHARDCOMP_CAPTURES=folder keeps them there.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import json
import logging
import os
import sys
import tempfile
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PretrainedConfig

import shardcomp
from shardcomp.cache_dir import cache_dir
from shardcomp.capture.captured import Captured, Unwritable, read, write
from shardcomp.ir.program import Signature

VARIABLE = "SHARDCOMP_CAPTURES"
_log = logging.getLogger("shardcomp.capture")

_KNOWN_CODE = frozenset(sys.stdlib_module_names) | {"torch", "transformers"}
"""Packages whose code is what their versions say."""
_WITHOUT_MODELS = frozenset({"numpy", "packaging", "huggingface_hub", "safetensors", "accelerate", "peft", "tqdm"})
"""Packages that transformers imports into files of models, and that compute nothing there."""
_MOST_FILES = 500
_PLAIN = (bool, int, float, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that each module has: its children, tensors and hooks."""
_WITHOUT_EFFECT = frozenset({"generation_config", "name_or_path", "warnings_issued", "_keep_in_fp32_modules_strict"})
"""Attributes that no forward reads."""


@dataclass(frozen=True)
class Entry:
    """Where a call of a model is kept. shape: the (b, s) of the caller, for a graph that holds for no other."""

    folder: Path
    key: str
    shape: tuple[int, int]

    def load(self) -> Captured | None:
        """What is kept; None where there is nothing, or nothing that can be trusted or read."""
        for path in (self._path(None), self._path(self.shape)):
            try:
                if _is_ours(self.folder) and _is_ours(path):
                    captured = read(path.read_text())
                    os.utime(path)  # files that were not used for long are removed first
                    return captured
            except (OSError, Unwritable) as error:
                _log.info("%s is not used: %s", path, error)
        return None

    def save(self, captured: Captured) -> None:
        """Keep a call. What cannot be kept, or a disk that is full, is logged and changes nothing else."""
        try:
            text = write(captured)
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_ours(self.folder):
                raise OSError(f"{self.folder} belongs to, or can be written by, somebody else")
            # Under its name a file is always whole, whatever else runs or ends meanwhile.
            with tempfile.TemporaryDirectory(dir=self.folder, suffix=".part") as part:
                written = Path(part, "captured.json")
                written.write_text(text)
                written.chmod(0o600)
                os.replace(written, self._path(captured.static_shape))
            _prune(self.folder)
        except (OSError, Unwritable) as error:
            _log.info("the capture is not kept: %s", error)

    def remove(self) -> None:
        """Drop what turned out to be wrong."""
        for shape in (None, self.shape):
            self._path(shape).unlink(missing_ok=True)

    def _path(self, shape: tuple[int, int] | None) -> Path:
        return self.folder / ("-".join((self.key, *map(str, shape or ()))) + ".json")


def entry(model: nn.Module, signature: Signature, dtype: torch.dtype, shape: tuple[int, int]) -> Entry | None:
    """Where a call of `model` is kept, whether it is there or not; None for a model that has code or state of its own."""
    place = os.environ.get(VARIABLE)
    if place == "anew":
        return None
    try:
        parts = [_versions(), repr((signature, dtype, torch.get_default_dtype())), *_describe_model(model, signature)]
    except _Unknown as unknown:
        _log.info("the capture is not kept: %s", unknown)
        return None
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:40]
    return Entry(Path(place) if place else cache_dir() / "captures", key, shape)


class _Unknown(Exception):
    """A part of a model whose effect on an export is not known."""


def _describe_model(model: nn.Module, signature: Signature) -> Iterator[str]:
    """Everything that an export of a model reads."""
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        raise _Unknown(f"{type(model).__name__} has no configuration of transformers")
    yield _text(config)
    classes = dict.fromkeys(base for module in model.modules() for base in type(module).__mro__)
    yield from _describe_code(tuple(classes))
    for name, module in model.named_modules():
        hooks = [key for key, hook in vars(module).items() if "_hooks" in key and isinstance(hook, Mapping) and hook]
        if hooks:
            raise _Unknown(f"{name or 'the model'} has {', '.join(hooks)}")
        own = {key: held for key, held in vars(module).items() if key not in _OF_EVERY_MODULE and key not in _WITHOUT_EFFECT}
        attributes = {key: _text(held) for key, held in sorted(own.items()) if held is not config}
        mode = module.training if signature.training is None else signature.training
        yield f"{name} {type(module).__qualname__} {mode} {attributes}"
    first: dict[int, str] = {}
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            same = first.setdefault(id(tensor), name)
            yield f"{name} {same} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad} {type(tensor).__qualname__}"


def _text(held: Any) -> str:
    """An attribute as text that is equal for equal effects."""
    if isinstance(held, _PLAIN):
        return f"{type(held).__name__} {held!r}"
    if isinstance(held, PretrainedConfig):
        implementations = {key: str(choice) for key, choice in sorted(vars(held).items()) if "_implementation" in key}
        return f"{type(held).__qualname__} {held.to_json_string(use_diff=False)} {implementations}"
    if isinstance(held, enum.Enum):
        return str(held)
    if isinstance(held, Mapping):
        return f"{{{', '.join(f'{_text(key)}: {_text(entry)}' for key, entry in held.items())}}}"
    if isinstance(held, (set, frozenset)):
        return f"{{{', '.join(sorted(_text(entry) for entry in held))}}}"
    if isinstance(held, (list, tuple)):
        return f"{type(held).__name__} [{', '.join(_text(entry) for entry in held)}]"
    if isinstance(held, functools.partial):
        return f"partial {_text(held.func)} {_text(held.args)} {_text(held.keywords)}"
    if isinstance(held, (type, types.FunctionType, types.BuiltinFunctionType)) and _is_known(held) and _is_global(held):
        return f"{held.__module__}.{held.__qualname__}"
    raise _Unknown(f"it holds {type(held).__qualname__} {held!r:.80}")


def _is_global(held: Any) -> bool:
    """Whether a function or a class is what its module has under its name, and so has no variables of an outer function."""
    return "<" not in held.__qualname__


def _is_known(held: Any) -> bool:
    return _package(held) in _KNOWN_CODE


def _package(held: Any) -> str:
    return str(getattr(held, "__module__", "")).partition(".")[0]


@functools.lru_cache(maxsize=64)
def _class_modules(classes: tuple[type, ...]) -> tuple[types.ModuleType, ...]:
    return tuple(dict.fromkeys(sys.modules[base.__module__] for base in classes if base.__module__ in sys.modules))


def _describe_code(classes: tuple[type, ...]) -> Iterator[str]:
    """The files that the classes of a model are in, and those of the functions that they call. Raises _Unknown where one of
    them is nobody's release, or was replaced by such a one."""
    files: dict[str, None] = {}
    for base in classes:
        if not _is_known(base) or not _is_global(base):
            raise _Unknown(f"the class {base.__module__}.{base.__qualname__}")
        _refuse_foreign(base.__qualname__, vars(base))
    for module in _class_modules(classes):
        if not module.__name__.startswith("transformers."):
            continue
        _refuse_foreign(module.__name__, vars(module))
        theirs = [held.__module__ for held in vars(module).values() if isinstance(held, (type, types.FunctionType))]
        for name in dict.fromkeys((module.__name__, *theirs)):
            file = getattr(sys.modules.get(name), "__file__", None)
            if file is not None and name.startswith("transformers."):
                files.setdefault(file)
    yield from sorted(_digest_of_file(file) for file in files)


def _refuse_foreign(owner: str, attributes: Mapping[str, Any]) -> None:
    for name, held in attributes.items():
        if isinstance(held, (type, types.FunctionType)) and _package(held) not in _KNOWN_CODE | _WITHOUT_MODELS:
            raise _Unknown(f"{owner}.{name} is code of {held.__module__}")


@functools.cache
def _digest_of_file(file: str) -> str:
    return f"{Path(file).name} {hashlib.sha256(Path(file).read_bytes()).hexdigest()}"


@functools.cache
def _versions() -> str:
    """The versions of what makes a capture, our own sources by their content."""
    folder = Path(shardcomp.__file__).parent
    sources = [*folder.rglob("*.py"), *(folder / "passes").glob("*.py")]
    digest = hashlib.sha256()
    for path in sorted(path for path in sources if path.relative_to(folder).parts[0] in ("capture", "ir", "kernels")):
        digest.update(path.read_bytes())
    versions = [sys.version, torch.__version__, transformers.__version__, digest.hexdigest()]
    return json.dumps(versions)


def _is_ours(path: Path) -> bool:
    """Whether a file or folder is there, is this user's, and nobody else can write to it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _prune(folder: Path) -> None:
    """Remove what was not used for longest, beyond the most that is kept."""
    files = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime)
    for path in files[:-_MOST_FILES]:
        path.unlink(missing_ok=True)
