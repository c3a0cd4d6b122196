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
from torch.nn.modules import module as torch_module
from transformers import PretrainedConfig

import shardcomp
from shardcomp.cache_dir import cache_dir
from shardcomp.capture.captured import Captured, Unwritable, read, write
from shardcomp.ir.program import Signature
from shardcomp.torch_private import function_modes

VARIABLE = "SHARDCOMP_CAPTURES"
_log = logging.getLogger("shardcomp.capture")

_KNOWN_FOLDERS = frozenset({"torch", "transformers", "stdlib"})
"""Packages whose code is what their versions say."""
_WITHOUT_MODELS = frozenset(
    {"numpy", "packaging", "huggingface_hub", "safetensors", "accelerate", "peft", "tqdm", "typing_extensions", "tokenizers"}
)
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
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks or function_modes():
        raise _Unknown("hooks of all modules, or a mode that sees all calls, are active")
    yield f"{_text(config)} {torch.is_autocast_enabled('cpu')} {torch.is_autocast_enabled('cuda')}"
    first: dict[int, str] = {}
    for tensors in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in tensors:
            same = first.setdefault(id(tensor), name)
            yield f"{name} {same} {tuple(tensor.shape)} {tensor.dtype} {tensor.requires_grad} {type(tensor).__qualname__}"
    classes = dict.fromkeys(base for module in model.modules() for base in type(module).__mro__)
    yield from _describe_code(tuple(classes))
    for name, module in model.named_modules():
        hooks = [key for key, hook in vars(module).items() if "_hooks" in key and isinstance(hook, Mapping) and hook]
        if hooks:
            raise _Unknown(f"{name or 'the model'} has {', '.join(hooks)}")
        own = {key: value for key, value in vars(module).items() if key not in _OF_EVERY_MODULE | _WITHOUT_EFFECT}
        attributes = {
            key: f"tensor {first[id(value)]}" if id(value) in first else _text(value)
            for key, value in sorted(own.items())
            if value is not config
        }
        mode = module.training if signature.training is None else signature.training
        yield f"{name} {type(module).__qualname__} {mode} {attributes}"


def _text(value: Any) -> str:
    """An attribute as text that is equal for equal effects."""
    if isinstance(value, _PLAIN):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, PretrainedConfig):
        implementations = {key: str(choice) for key, choice in sorted(vars(value).items()) if "_implementation" in key}
        return f"{type(value).__qualname__} {value.to_json_string(use_diff=False)} {implementations}"
    if isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_text(key)}: {_text(entry)}' for key, entry in value.items())}}}"
    if isinstance(value, (set, frozenset)):
        return f"{{{', '.join(sorted(_text(entry) for entry in value))}}}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} [{', '.join(_text(entry) for entry in value)}]"
    if isinstance(value, functools.partial):
        return f"partial {_text(value.func)} {_text(value.args)} {_text(value.keywords)}"
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)) and not _foreign(value) and _is_global(value):
        return f"{value.__module__}.{value.__qualname__}"
    raise _Unknown(f"it holds {type(value).__qualname__} {value!r:.80}")


def _is_global(value: Any) -> bool:
    """Whether a function or a class is what its module has under its name, and so has no variables of an outer function."""
    return "<" not in value.__qualname__


def _describe_code(classes: tuple[type, ...]) -> Iterator[str]:
    """The files that the classes of a model are in, and those of what these files import. Raises _Unknown where one of them is
    nobody's release, or a part of it was replaced."""
    names: dict[str, None] = {"torch": None, "torch.nn.functional": None}
    for base in classes:
        if _foreign(base) or not _is_global(base):
            raise _Unknown(f"the class {base.__module__}.{base.__qualname__}")
        _refuse_foreign(base.__qualname__, vars(base))
        if base.__module__.startswith("transformers."):
            names.setdefault(base.__module__)
            imported = vars(sys.modules[base.__module__]).values()
            for value in imported:
                if isinstance(value, (type, types.FunctionType)) and value.__module__.startswith("transformers."):
                    names.setdefault(value.__module__)
    modules = [sys.modules[name] for name in names if name in sys.modules]
    for module in modules:
        _refuse_foreign(module.__name__, vars(module))
    yield from sorted(_digest_of_file(str(module.__file__)) for module in modules if module.__file__)


def _refuse_foreign(owner: str, attributes: Mapping[str, Any]) -> None:
    """Raise _Unknown where a function, a method, or an entry of a table was put there by other code."""
    for name, value in attributes.items():
        for part in (value, *value.values()) if type(value) is dict and not name.startswith("__") else (value,):
            if _foreign(part, _KNOWN_FOLDERS | _WITHOUT_MODELS):
                raise _Unknown(f"{owner}.{name} is code of {getattr(part, '__module__', type(part).__module__)}")


def _foreign(value: Any, known: frozenset[str] | None = None) -> bool:
    """Whether a function or a class is code of neither torch, transformers nor Python's library.

    A function is judged by the file that it is in: one that was made with `functools.wraps` names the module of what it wraps.
    """
    known = _KNOWN_FOLDERS if known is None else known
    while isinstance(value, (staticmethod, classmethod, functools.partial, types.MethodType)):
        value = value.func if isinstance(value, functools.partial) else value.__func__
    if isinstance(value, property):
        value = value.fget
    if isinstance(value, types.FunctionType):
        return _folder_of(value.__code__.co_filename) not in known
    if isinstance(value, type):
        return value.__module__.partition(".")[0] not in known | sys.stdlib_module_names
    return False


_LIBRARY = Path(os.__file__).resolve().parent


@functools.lru_cache(maxsize=10_000)
def _folder_of(file: str) -> str:
    """The package that a file of code belongs to; `stdlib` for Python's own and for what it generates; "" where unknown."""
    if file.startswith("<"):
        return "stdlib" if file == "<string>" or file.startswith("<frozen ") else ""  # generated for dataclasses, or built in
    path = Path(file).resolve()
    for package in (*_KNOWN_FOLDERS, *_WITHOUT_MODELS):
        module = sys.modules.get(package)
        if module is not None and module.__file__:
            place = Path(module.__file__).resolve()
            # A package is its folder. A module of one file lies in a folder with others.
            if path == place or (place.stem == "__init__" and path.is_relative_to(place.parent)):
                return package
    own = path.is_relative_to(_LIBRARY) and not {"site-packages", "dist-packages"} & set(path.parts)
    return "stdlib" if own else ""


@functools.cache
def _digest_of_file(file: str) -> str:
    return f"{Path(file).name} {hashlib.sha256(Path(file).read_bytes()).hexdigest()}"


@functools.cache
def _versions() -> str:
    """The versions of what makes a capture, our own sources by their content."""
    folder = Path(shardcomp.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for name in ("capture", "ir", "kernels") for path in (folder / name).glob("*.py")):
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
