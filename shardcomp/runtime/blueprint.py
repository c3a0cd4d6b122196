"""What the runtime knows of a lowered program: the emitted source and a table of parameters. It is saved as files that people
read, and loads without the compiler."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from shardcomp.errors import PlanError
from shardcomp.ir.layout import Layout, split
from shardcomp.ir.mesh import Mesh
from shardcomp.ir.packed import PackedSlice
from shardcomp.ir.precision import COMPUTE as COMPUTE
from shardcomp.ir.precision import MASTER as MASTER
from shardcomp.ir.program import source_files as source_files

_loading = threading.Lock()
_PLAN, _BUFFERS = "plan.json", "buffers.safetensors"


@dataclass(frozen=True)
class ParameterPlan:
    """A parameter: its full shape, the dim that each axis splits, the axes on which its gradient is partial, and the packed
    slice that it is, if any."""

    shape: tuple[int, ...]
    requires_grad: bool
    split: dict[str, int]
    partial_gradient: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()
    part: PackedSlice | None = None
    copies: int = 1
    """How many neighbouring ranks of tp have the same shard."""
    idle: bool = False
    """Whether the call does not use it."""

    @property
    def layout(self) -> Layout:
        layout = Layout()
        for axis, dim in self.split.items():
            layout = layout.put(axis, split(dim, self.copies if axis == "tp" else 1))
        return layout


@dataclass(frozen=True)
class UnitPlan:
    """A unit: its path, its parameters and buffers (the name in the emitted code -> the name in the model), and its plan, as in
    `program.Plan`."""

    path: str
    parameters: dict[str, str]
    buffers: dict[str, str]
    stage: int = 0
    recompute: str = "none"
    reshard: bool = False
    offload: bool = False
    whole_backward: bool = False


@dataclass(frozen=True)
class IndexBound:
    """The numbers that an input may have: 0 to `size` - 1, and `ignored`."""

    size: int
    ignored: int | None = None


@dataclass(frozen=True)
class Blueprint:
    """A lowered program for one call signature.

    `inputs` are the caller's; `token_inputs` those that counting the labels needs. The sequence length must be a multiple of
    `sequence_multiple`. `output_split`: output name -> (dim that tp splits, full size). `output_type`: "module:class" of
    what the model returns. `seed`: what dropout starts from. `sources`: the Python of each stage, in the order of the model.
    `offload`: whether the host keeps what the optimizer needs. `ignored_label`: the label of a token that does not count.
    `compile`: whether torch.compile runs the units. `policy`: what it was lowered under, for the checkpoints of a run.
    `index_bounds`: what inputs that are looked up in the vocabulary may hold. `label_inputs`: those that hold labels.
    `positional`: the names of the model's arguments, in order. `compare_ranks`: whether ranks compare weights and batches.
    """

    name: str
    sources: tuple[str, ...]
    mesh: Mesh
    precision: str
    inputs: tuple[str, ...]
    token_inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    units: tuple[UnitPlan, ...]
    parameters: dict[str, ParameterPlan]
    buffers: dict[str, Tensor] = field(repr=False)
    persistent_buffers: tuple[str, ...] = ()
    training: bool | None = True
    sequence_multiple: int = 1
    static_shape: tuple[int, int] | None = None
    micro_batch: int | None = None
    output_split: dict[str, tuple[int, int]] = field(default_factory=dict)
    output_type: str = "builtins:dict"
    seed: int = 0
    schedule: str = "1f1b"
    zero: int = 0
    offload: bool = False
    ignored_label: int = -100
    compile: bool = False
    policy: dict[str, Any] = field(default_factory=dict, repr=False)
    index_bounds: dict[str, IndexBound] = field(default_factory=dict)
    label_inputs: tuple[str, ...] = ()
    positional: tuple[str, ...] = ()
    compare_ranks: bool = True

    def module(self, stage: int = 0) -> ModuleType:
        """The emitted source of a stage, imported from a real file, so that tracebacks and debuggers show its lines."""
        source = self.sources[stage]
        digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        name = f"shardcomp_emitted_{digest}"
        with _loading:
            return sys.modules[name] if name in sys.modules else self._import(source, name, digest)

    def _import(self, source: str, name: str, digest: str) -> ModuleType:
        root = Path(tempfile.gettempdir()) / f"shardcomp-{os.getuid()}"
        root.mkdir(exist_ok=True, mode=0o700)
        if root.stat().st_uid != os.getuid():  # never run code from another user's folder
            root = Path(tempfile.mkdtemp(prefix="shardcomp-"))
        folder = root / digest
        folder.mkdir(exist_ok=True)
        path = folder / source_files(1)[0]
        if not path.exists() or path.read_text() != source:
            scratch = path.with_suffix(f".{os.getpid()}.tmp")
            scratch.write_text(source)
            scratch.replace(path)
        return _load(path, name)

    def save(self, directory: str | Path) -> None:
        """Write `model.py` (`stage_N.py` for several stages), `plan.json`, the buffers. `load` runs the sources as edited."""
        from safetensors.torch import save_file

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        names = source_files(len(self.sources))
        for name, source in zip(names, self.sources, strict=True):
            (folder / name).write_text(source)
        plan = {key: value for key, value in asdict_shallow(self).items() if key != "buffers"}
        plan["sources"] = names
        plan["mesh"] = asdict(self.mesh)
        plan["units"] = [asdict(unit) for unit in self.units]
        plan["index_bounds"] = {name: asdict(bound) for name, bound in self.index_bounds.items()}
        plan["parameters"] = {name: asdict(parameter) for name, parameter in self.parameters.items()}
        (folder / _PLAN).write_text(json.dumps(plan, indent=1))
        save_file({name: buffer.contiguous() for name, buffer in self.buffers.items()}, folder / _BUFFERS)

    @staticmethod
    def load(directory: str | Path) -> Blueprint:
        """Read what `save` wrote. Raises PlanError where files are missing."""
        from safetensors.torch import load_file

        folder = Path(directory)

        def require(names: Sequence[str]) -> None:
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise PlanError(f"{folder}: no {', '.join(missing)}; give a directory that save_source wrote")

        require((_PLAN, _BUFFERS))
        plan: dict[str, Any] = json.loads((folder / _PLAN).read_text())
        require(plan["sources"])
        plan["sources"] = tuple((folder / name).read_text() for name in plan["sources"])
        plan["mesh"] = Mesh(**plan["mesh"])
        plan["units"] = tuple(UnitPlan(**unit) for unit in plan["units"])
        plan["parameters"] = {
            name: ParameterPlan(
                tuple(p["shape"]),
                p["requires_grad"],
                p["split"],
                tuple(p["partial_gradient"]),
                tuple(p["aliases"]),
                p["part"] and PackedSlice(**{**p["part"], "shape": tuple(p["part"]["shape"])}),
                p["copies"],
                p["idle"],
            )
            for name, p in plan["parameters"].items()
        }
        plan["index_bounds"] = {name: IndexBound(**bound) for name, bound in plan["index_bounds"].items()}
        for key in ("inputs", "token_inputs", "outputs", "persistent_buffers", "label_inputs", "positional"):
            plan[key] = tuple(plan[key])
        plan["output_split"] = {key: (dim, size) for key, (dim, size) in plan["output_split"].items()}
        plan["static_shape"] = plan["static_shape"] and tuple(plan["static_shape"])
        return Blueprint(buffers=load_file(folder / _BUFFERS), **plan)


def asdict_shallow(blueprint: Blueprint) -> dict[str, Any]:
    return {name: getattr(blueprint, name) for name in blueprint.__dataclass_fields__}


def _load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
