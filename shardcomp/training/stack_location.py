"""Where a process is, read from its Python stacks: the collective that it waits in, the axis, the unit and the source lines.

Nothing is recorded while a program runs. A stack is read only on demand: another thread reads it, or an exception has it.
"""

from __future__ import annotations

import itertools
import json
import linecache
import re
import sys
import sysconfig
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from shardcomp.ir.collectives import Axis
from shardcomp.runtime.unit import Unit, UnitParameters
from shardcomp.torch_private import distributed_c10d

_TORCH = str(Path(torch.__file__).parent)
_SHARDCOMP = str(Path(__file__).parents[1])
_STDLIB = sysconfig.get_path("stdlib")
_LIBRARIES = (_STDLIB, sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), "<frozen")

_ALIASES = {
    "_all_gather_base": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "all_gather_single": "all_gather",
    "all_gather_tensor": "all_gather",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_single": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "batch_isend_irecv": "send or receive",
    "_store_based_barrier": "barrier",
}
_NAMES = """all_reduce all_reduce_coalesced all_gather all_gather_coalesced all_gather_object all_to_all barrier broadcast
    broadcast_object_list gather gather_object init_process_group monitored_barrier new_group recv recv_object_list reduce
    reduce_scatter scatter scatter_object_list send send_object_list split_group wait_tensor"""
_COLLECTIVES = {name: name for name in _NAMES.split()} | _ALIASES
"""Functions of torch.distributed that wait for other ranks -> their names in messages."""

_OF_DEVICE = re.compile(r"\.(item|tolist|cpu|numpy|nonzero|synchronize|_cuda_synchronize)\(|^(float|int|bool)\(")
_FAILED = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket|timed out", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """Where a rank is.

    kind: "collective" (it waits for other ranks), "device" (it waits for its GPU) or "code" (neither).
    what: the collective with its axis or ranks, such as "all_reduce over tp", or the call that waits for the GPU.
    where: units and source lines.
    """

    kind: str
    what: str
    where: str

    def __str__(self) -> str:
        if self.kind == "code":
            return self.where
        return f"{self.what} ({self.where})" if self.where else self.what


@dataclass(frozen=True)
class _Call:
    """One frame of a stack, and the line and instruction it is at."""

    frame: FrameType
    line: int
    instruction: int

    @property
    def file(self) -> str:
        return self.frame.f_code.co_filename

    @property
    def name(self) -> str:
        return self.frame.f_code.co_name

    def local(self, name: str) -> Any:
        return self.frame.f_locals.get(name)

    @property
    def emitted(self) -> bool:
        return str(self.frame.f_globals.get("__name__", "")).startswith("shardcomp_emitted_")

    @property
    def own(self) -> bool:
        """Whether this is the user's code, rather than shardcomp's or a library's."""
        library = self.file.startswith((_TORCH, _SHARDCOMP, *_LIBRARIES))
        return not (library or self.emitted)

    @property
    def text(self) -> str:
        """The source of the call that this frame is in; only its first line if it has several."""
        positions = itertools.islice(self.frame.f_code.co_positions(), max(0, self.instruction // 2), None)
        first, last, begin, end = next(positions, (None,) * 4)
        if first is None or begin is None:
            return ""
        source = linecache.getline(self.file, first).encode()
        return source[begin : end if first == last else None].decode(errors="replace").strip()

    def __str__(self) -> str:
        name = self.frame.f_code.co_qualname.replace("<locals>.", "")
        return f"{Path(self.file).name}:{self.line}" + ("" if name == "<module>" else f" in {name}")


def here(thread: int | None = None, ignore: Sequence[str] = ("shardcomp-",)) -> Place:
    """Where this process is now.

    The thread that trains may wait for another one: on a GPU, autograd runs the backward in a thread of its own. So if it is in
    torch but not in a collective, the other threads are looked at as well.

    Args:
        thread: the identifier of the thread that trains; by default the main one.
        ignore: threads whose name starts with one of these are not looked at.
    """
    names = {running.ident: running.name for running in threading.enumerate()}
    frames = sys._current_frames()
    main = thread if thread in frames else threading.main_thread().ident
    first = list(_stack(frames[main])) if main in frames else []
    place = place_of(first)
    if place.kind == "collective" or not first or first[0].own:
        return place
    for ident, frame in frames.items():
        if ident not in (main, threading.get_ident()) and not names.get(ident, "").startswith(tuple(ignore)):
            stack = list(_stack(frame))
            if (other := place_of(stack, first)).kind == "collective":
                return other
    return place


def of_error(error: BaseException) -> Place:
    """Where an exception was raised."""
    inner = list(_raised(error.__traceback__))[::-1]
    outer = list(_stack(inner[-1].frame.f_back)) if inner and inner[-1].frame.f_back else []
    return place_of([*inner, *outer])


def is_communication(error: BaseException) -> bool:
    """Whether an exception says that a collective failed, rather than that it was called wrongly."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(_FAILED.search(str(error)))


def _stack(frame: FrameType | None) -> Iterator[_Call]:
    """The frames of a running thread, the innermost first."""
    while frame is not None:
        yield _Call(frame, frame.f_lineno or 0, frame.f_lasti)
        frame = frame.f_back


def _raised(at: TracebackType | None) -> Iterator[_Call]:
    while at is not None:
        yield _Call(at.tb_frame, at.tb_lineno, at.tb_lasti)
        at = at.tb_next


def place_of(stack: Sequence[_Call], caller: Sequence[_Call] = ()) -> Place:
    """Where a stack is.

    Args:
        stack: the innermost frame first.
        caller: the stack of the thread that waits for this one.
    """
    if not stack:
        return Place("code", "", "no Python code")
    # Only the frames of torch that the innermost other frame called: what is further out is no longer waited in.
    named = [call for call in _leading(stack) if call.name in _COLLECTIVES and _sends(call.file)]
    innermost = stack[0]
    where = _where(stack, caller)
    if named:
        # The outermost one: a broadcast of objects calls two broadcasts of tensors.
        call, op = named[-1], _COLLECTIVES[named[-1].name]
        if op in ("send", "recv") and (peer := call.local("dst" if op == "send" else "src")) is not None:
            return Place("collective", f"{op} {'to' if op == 'send' else 'from'} rank {peer}", where)
        return Place("collective", f"{op} over {_over(stack, call.local('group'))}", where)
    waited = re.search(r"\.wait\(", innermost.text) and not innermost.file.startswith(_STDLIB)
    if waited or innermost.file.startswith(_TORCH) and _sends(innermost.file) and innermost.name == "wait":
        return Place("collective", f"{_waited_for(stack)} over {_over(stack, None)}", where)
    if torch.cuda.is_available() and torch.cuda.is_initialized() and _OF_DEVICE.search(innermost.text):
        return Place("device", f"its GPU in {innermost.text}{_pending()}", where)
    return Place("code", "", where or str(innermost))


def _leading(stack: Sequence[_Call]) -> Iterator[_Call]:
    """The frames of torch and the standard library that a stack begins with."""
    for call in stack:
        if not call.file.startswith((_TORCH, _STDLIB, "<frozen")):
            return
        yield call


def _sends(file: str) -> bool:
    return file.startswith(_TORCH) and file.endswith(("distributed_c10d.py", "_functional_collectives.py"))


def _of_pipeline(call: _Call) -> bool:
    return "distributed/pipelining" in call.file or call.file.endswith("runtime/stage.py")


def _is_fsdp_group(instance: Any) -> bool:
    """Whether this is a group of parameters that FSDP gathers together."""
    return hasattr(instance, "mesh_info") and hasattr(instance, "modules")


def _instances(stack: Sequence[_Call], *paths: str) -> Iterator[Any]:
    """The objects whose methods are running, of emitted classes and of those in files below `paths`."""
    for call in stack:
        if call.file.startswith(paths) or call.emitted:
            yield call.local("self")


def _over(stack: Sequence[_Call], group: Any) -> str:
    """The axis of the mesh that a collective is sent along, else its ranks."""
    for instance in _instances(stack, _SHARDCOMP, f"{_TORCH}/distributed/fsdp"):
        if isinstance(instance, Axis):
            return instance.name
        names = _is_fsdp_group(instance) and instance.mesh_info.mesh.mesh_dim_names
        if names:  # of two, parameters are sharded along the second and replicated along the first
            return names[0] if any(call.name == "all_reduce" for call in stack[:8]) else names[-1]
    if any(_of_pipeline(call) for call in stack):
        return "pp"
    try:
        described = getattr(group, "group_desc", "")
        if described.startswith("mesh_"):
            return described.removeprefix("mesh_")
        if isinstance(group, dist.ProcessGroup) and group.size() < dist.get_world_size():
            return f"ranks {listed(dist.get_process_group_ranks(group))}"
    except (RuntimeError, ValueError, TypeError):
        return "a group"
    return "all ranks"


def _waited_for(stack: Sequence[_Call]) -> str:
    """The collective that was started before, and is waited for now."""
    names = [call.name for call in stack[:8]]
    if any(_of_pipeline(call) for call in stack[:4]):
        actions = [action for call in stack if call.file.startswith(_TORCH) and (action := call.local("action")) is not None]
        return f"send or receive {_action(actions[0])}" if actions else "send or receive"
    if any("fsdp" in call.file for call in stack[:4]):
        return "reduce_scatter" if any("reduce" in name for name in names) else "all_gather"
    return f"{stack[0].text.split('(')[0]}()"


def _action(action: Any) -> str:
    """An action of one of torch's pipeline schedules, in words."""
    if getattr(action, "computation_type", None) is None or action.microbatch_index is None:
        return f"({action})"
    what = action.computation_type.name.lower().replace("_", " ")
    return f"(for {what} of stage {action.stage_index}, micro-batch {action.microbatch_index})"


def _where(stack: Sequence[_Call], caller: Sequence[_Call]) -> str:
    """The phase and the unit, the line of its emitted source, and the innermost line of the user's own code."""
    backward = bool(caller) or any(call.name == "_engine_run_backward" for call in stack)
    parts = []
    if unit := _unit(stack):
        parts.append(("backward of " if backward else "") + unit)
    elif backward:
        parts.append("backward")
    if any("distributed/fsdp" in call.file for call in stack):
        parts.append("FSDP")
    # The emitted code of a stage calls its units'. The innermost line is the unit's.
    parts += [str(call) for call in stack if call.emitted][:1]
    own = [call for call in (*stack, *caller) if call.own][:1]
    parts += [str(call) for call in own]
    if own and not stack[0].own and not any(call.emitted or call.file.startswith((_TORCH, _SHARDCOMP)) for call in stack):
        parts.append(f"from there {stack[0]}")
    return ", ".join(parts)


def _unit(stack: Sequence[_Call]) -> str:
    """The path of the unit that is computed, or whose parameters FSDP sends."""
    for instance in _instances(stack, _SHARDCOMP, f"{_TORCH}/distributed/fsdp"):
        if isinstance(instance, Axis) and instance.unit:
            return instance.unit
        if isinstance(instance, Unit):
            return instance.unit_parameters.path
        modules = instance.modules if _is_fsdp_group(instance) else (instance,)
        if paths := [module.path for module in modules if isinstance(module, UnitParameters)]:
            return ", ".join(paths)
    return ""


def _pending() -> str:
    """The oldest collective that has not ended on this GPU, as torch's flight recorder has it."""
    dump = getattr(distributed_c10d, "_dump_nccl_trace_json", None)
    try:
        return "" if dump is None else oldest_pending(json.loads(dump(includeCollectives=True, onlyActive=True)))
    except (RuntimeError, ValueError, TypeError):
        return ""


def oldest_pending(recorded: dict[str, Any]) -> str:
    """The first collective in a flight recorder's dump that has started and not ended: ", after all_reduce over tp", or ""."""
    for entry in recorded.get("entries", ()):
        if entry.get("state") != "completed" and not entry.get("retired"):
            described = str(entry["process_group"][1]).removeprefix("mesh_")
            return f", after {str(entry['profiling_name']).rpartition(':')[2]} over {described}"
    return ""


def listed(numbers: Iterable[int]) -> str:
    """Numbers in words, three or more consecutive ones as a range.

    Example:
        >>> listed([0, 1, 4, 5, 6, 7])
        '0, 1 and 4-7'
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [text for run in runs for text in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run))]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else "none"
