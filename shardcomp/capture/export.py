"""One call of `torch.export` on a fake twin, and its failures in the caller's words."""

from __future__ import annotations

import inspect
import io
import linecache
import traceback
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.overrides import TorchFunctionMode

import shardcomp
from shardcomp.capture.refusals import RealTensors
from shardcomp.capture.vmap import broadcast
from shardcomp.errors import CaptureError
from shardcomp.ir.precision import Widened
from shardcomp.ir.program import Signature
from shardcomp.torch_private import FakeTensorMode


@dataclass(frozen=True)
class Export:
    """What torch.export made of a call. outputs: what the program returns, in order. kind: the type of the model's result."""

    program: ExportedProgram
    outputs: tuple[str, ...]
    kind: type


def export(
    module: nn.Module,
    mode: FakeTensorMode,
    signature: Signature,
    sample: tuple[int, int],
    shortest: int | None,
    widened: bool,
    real: RealTensors,
) -> Export:
    """Export `module` called with [b, s] int64 inputs; b and s stay symbols, s at least `shortest`, or else they are `sample`.
    `real` notes which tensors with data it computes with.

    The export has those of `signature.outputs` that the model returns; CaptureError if it returns none.
    """
    with mode:
        arguments: dict[str, Any] = {name: torch.ones(sample, dtype=torch.int64) for name, _ in signature.inputs}
    shapes: dict[str, Any] = {}
    dynamic = shortest is not None
    if dynamic:
        dims = {0: Dim("b", min=1), 1: Dim("s", min=shortest)}
        # All inputs are [b, s], and share one b and one s.
        shapes = {name: dict(dims) for name in arguments}
    parameters = inspect.signature(module.forward).parameters
    # A cache would be a further result, and a tuple has no names for the results.
    for name, setting in (("use_cache", False), ("return_dict", True)):
        if name in parameters:
            arguments[name] = setting
            shapes[name] = None
    if not arguments.keys() <= parameters.keys():
        module.forward = _by_name(module.forward, list(arguments))
    results = _Results(signature)
    hook = module.register_forward_hook(results)
    try:
        # torch prints the graph so far to stderr where an export fails; the error that is raised says what matters.
        quiet = warnings.catch_warnings(action="ignore"), redirect_stderr(io.StringIO())
        modes = _NoLayerDrop(), Widened() if widened else nullcontext(), patch.object(nn.functional, _SDPA.__name__, _sdpa)
        free = shapes if shortest is not None else None
        # enable_grad, because a caller under no_grad must get the same graph.
        with broadcast(), modes[0], modes[1], modes[2], real, torch.enable_grad(), quiet[0], quiet[1]:
            program = torch.export.export(module, (), arguments, strict=False, dynamic_shapes=free)
    finally:
        hook.remove()
    assert results.kind is not None
    return Export(program, results.outputs, results.kind)


def _by_name(forward: Callable[..., Any], names: list[str]) -> Callable[..., Any]:
    """`forward` with a signature of just these names: torch.export has no free sizes for what only `**kwargs` takes."""

    def call(**arguments: Any) -> Any:
        return forward(**arguments)

    call.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    )
    return call


_SDPA = nn.functional.scaled_dot_product_attention


def _sdpa(*args: Any, **settings: Any) -> Tensor:
    """torch's own, which takes no comparison of sizes for `is_causal`: "more than one token" is true of every size here."""
    return _SDPA(*(_settled(argument) for argument in args), **{key: _settled(setting) for key, setting in settings.items()})


def _settled(argument: Any) -> Any:
    return bool(argument) if isinstance(argument, torch.SymBool) else argument


class _NoLayerDrop(TorchFunctionMode):
    """A number drawn from [0, 1) is not below zero: a model that leaves out layers with probability 0 leaves out none."""

    def __init__(self) -> None:
        self.drawn: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, or answer whether a drawn number is below zero."""
        # `torch.rand([]) < self.layerdrop`, as OPT has it: a question about data, which no graph can answer.
        below = getattr(func, "__name__", "") in ("lt", "__lt__") and isinstance(args[1], (int, float)) and args[1] <= 0
        if below and any(args[0] is number for number in self.drawn):
            return False
        result = func(*args, **(kwargs or {}))
        if func is torch.rand and result.dim() == 0:
            self.drawn.append(result)
        return result


class _Results:
    """A forward hook: notes the type of the model's result and keeps what the signature asks for and the model returns."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature
        self.kind: type | None = None
        self.outputs: tuple[str, ...] = ()

    def __call__(self, module: nn.Module, args: Any, result: Any) -> tuple[Tensor, ...]:
        self.kind = type(result)
        # HuggingFace's outputs are mappings. The graph must return tensors alone, so they are taken out here.
        results = result if isinstance(result, Mapping) else {}
        self.outputs = tuple(name for name in self.signature.outputs if isinstance(results.get(name), Tensor))
        if not self.outputs:
            has = tuple(key for key, tensor in results.items() if isinstance(tensor, Tensor)) or (self.kind.__name__,)
            raise missing(module, self.signature, has)
        return tuple(results[name] for name in self.outputs)


def missing(module: nn.Module, signature: Signature, has: tuple[str, ...]) -> CaptureError:
    """The error of a model that does not return all that the signature asks for."""
    lacks = " and no ".join(name for name in signature.outputs if name not in has)
    names = ", ".join(name for name, _ in signature.inputs)
    return CaptureError(f"{type(module).__name__}({names}) returns no {lacks}: it returns {', '.join(has)}")


def explain(error: BaseException, module: nn.Module) -> str:
    """Where in the model an export failed and why: the innermost module and source line that are the model's own."""
    names = {id(child): name for name, child in module.named_modules()}
    where, line = type(module).__name__, ""
    # From the outermost frame inwards: the last one that fits is the innermost.
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            where = f"{names[id(owner)] or 'the model'} ({type(owner).__name__})"
        file = frame.f_code.co_filename
        if _is_model_code(file):
            line = f", {Path(file).name}:{number}: {linecache.getline(file, number).strip()}"
    lines = [text.strip() for text in str(error).splitlines() if text.strip()] or [type(error).__name__]
    # torch lists violated constraints as bullets, and the first says most.
    reason = next((text.removeprefix("- ") for text in lines if text.startswith("- ")), lines[0])
    return f"{where}{line}: {reason}"


_TORCH, _OURS = (str(Path(str(package.__file__)).parent) for package in (torch, shardcomp))


def _is_model_code(file: str) -> bool:
    return not file.startswith((_TORCH, _OURS, "<"))
