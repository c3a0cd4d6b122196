"""From an unmodified HuggingFace model to a Program: `torch.export` on fake tensors, with attention as one operator.

The caller's model is not edited; a deep copy with fake tensors is traced. Nothing falls back silently: what is captured with less
than it could be is listed under `degraded`, and what cannot be captured is a CaptureError.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from shardcomp import presets
from shardcomp.capture.graph import Conversion
from shardcomp.capture.masks import NAME, Unclassified, intercepted
from shardcomp.capture.twin import configurations, fake_inputs, fake_mode, fake_twin
from shardcomp.errors import CaptureError
from shardcomp.precision import Widened
from shardcomp.program import BUFFER, INPUT, PARAMETER, Buffer, Degraded, Parameter, Program, Signature, Unit
from shardcomp.runtime.blueprint import COMPUTE

SAMPLE = (2, 24)
"""The batch and the length that are traced where both are symbolic."""
_lock = threading.Lock()


def capture(
    model: nn.Module, signature: Signature, *, precision: str = "bf16", sample: tuple[int, int] | None = None
) -> Program:
    """Capture one call signature of `model` in the dtype that `precision` computes in.

    model: a HuggingFace model, or any module whose forward returns a mapping; its weights may be real or on meta. sample: the
    (batch, length) to capture a model at that does not export with symbolic sizes.
    Raises CaptureError naming the module and the line that cannot be traced.
    """
    with _lock:
        return _Capture(model, signature, precision, sample or SAMPLE).run()


class _Capture:
    def __init__(self, model: nn.Module, signature: Signature, precision: str, sample: tuple[int, int]) -> None:
        self.model, self.signature, self.precision, self.sample = model, signature, precision, sample
        self.degraded: list[Degraded] = []
        self.output_type: Callable[..., Any] = dict
        self.stack: list[str] = []

    def run(self) -> Program:
        exported, twin, static = self._export()
        trainable = {name: p.requires_grad for name, p in twin.named_parameters(remove_duplicate=False)}
        inputs = [name for name, _ in self.signature.inputs]
        conversion = Conversion(exported, inputs, trainable, static)
        body = conversion.body()
        parameters, first_names = self._parameters(twin)
        for node in body.placeholders(PARAMETER):
            node.meta["path"] = first_names[node.meta["path"]]
        _merge_tied(body)
        values = {node.meta["path"]: node.meta["value"] for node in body.placeholders(INPUT)}
        used = body.placeholders(PARAMETER), body.placeholders(BUFFER)
        unit = Unit(
            "",
            "model",
            body,
            tuple(node.meta["path"] for node in body.placeholders(INPUT)),
            self.signature.outputs,
            tuple(node.meta["path"] for node in used[0]),
            tuple(node.meta["path"] for node in used[1]),
        )
        results = zip(self.signature.outputs, body.results, strict=True)
        return Program(
            name=type(self.model).__name__,
            signature=self.signature,
            units=[unit],
            inputs=dict(values),
            outputs={name: name for name in self.signature.outputs},
            values={**values, **{name: node.meta["value"] for name, node in results}},
            parameters=parameters,
            buffers=self._buffers(conversion, set(unit.buffers)),
            output_type=self.output_type,
            config=getattr(self.model, "config", None),
            static_shape=self.sample if static else None,
            degraded=self.degraded,
        )

    def _export(self) -> tuple[Any, nn.Module, bool]:
        """The exported program: with the attention operator if the model's masks can be trusted, with symbolic sizes if it can."""
        distrust: str | None = "the model is not one of transformers"
        if any(True for _ in configurations(self.model)):
            with intercepted() as seen:
                try:
                    exported, twin, static = self._export_sizes(NAME)
                    distrust = seen.distrust()
                except (Unclassified, TypeError) as problem:
                    distrust = str(problem)
                except CaptureError as problem:
                    if not isinstance(problem.__cause__, (Unclassified, TypeError)):
                        raise
                    distrust = str(problem.__cause__)
            if distrust is None:
                return exported, twin, static
        self.degraded.append(Degraded("attention is captured as the model writes it, not as one operator", distrust))
        return self._export_sizes(None)

    def _export_sizes(self, attention: str | None) -> tuple[Any, nn.Module, bool]:
        try:
            return *self._trace(attention, symbolic=True), False
        except Exception as problem:
            if not _about_sizes(problem):
                raise
            why = str(problem).strip().splitlines()[0]
        found = self._trace(attention, symbolic=False)
        self.degraded.append(Degraded(f"captured for batch {self.sample[0]} and length {self.sample[1]} only", why))
        return *found, True

    def _trace(self, attention: str | None, symbolic: bool) -> tuple[Any, nn.Module]:
        dtype = COMPUTE[self.precision]
        mode = fake_mode()
        twin = fake_twin(self.model, mode, dtype).train(self.signature.training)
        if attention is not None:
            for config in configurations(twin):
                config._attn_implementation = attention
        arguments = fake_inputs(twin, self.signature, mode, self.sample, dtype)
        shapes: dict[str, Any] | None = None
        if symbolic:
            named = torch.export.Dim("b", min=1), torch.export.Dim("s", min=2)
            shapes = {n: dict(enumerate(named)) if isinstance(held, Tensor) else None for n, held in arguments.items()}
        self.stack = []
        hooks = [twin.register_forward_hook(self._select), *self._follow(twin)]
        try:
            with _quiet(), Widened() if self.precision == "fp64" else contextlib.nullcontext():
                return torch.export.export(twin, (), arguments, strict=False, dynamic_shapes=shapes), twin
        except Exception as problem:
            if _about_sizes(problem):
                raise
            raise CaptureError(self._where(problem)) from problem
        finally:
            for hook in hooks:
                hook.remove()

    def _select(self, module: nn.Module, args: Any, result: Any) -> Any:
        """Note what the model returns, and keep the tensors that are wanted."""
        if not hasattr(result, "keys"):
            raise CaptureError(f"{type(module).__name__} returns {type(result).__name__}: it must return a mapping, as HuggingFace's do")
        self.output_type = type(result)
        missing = [name for name in self.signature.outputs if result.get(name) is None]
        if missing:
            has = ", ".join(name for name in result if result[name] is not None)
            raise CaptureError(f"{type(module).__name__} returns no {', '.join(missing)} for {self.signature}; it returns {has}")
        return tuple(result[name] for name in self.signature.outputs)

    def _follow(self, twin: nn.Module) -> Iterator[Any]:
        """Keep track of which module runs, so that a failure can be placed."""
        for path, module in twin.named_modules():
            yield module.register_forward_pre_hook(lambda m, a, path=path: self.stack.append(path))
            yield module.register_forward_hook(lambda m, a, r: self.stack.pop() and None)

    def _where(self, problem: BaseException) -> str:
        frames = traceback.extract_tb(problem.__traceback__)
        own = [frame for frame in frames if "/torch/" not in frame.filename and "shardcomp" not in frame.filename]
        line = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else "no line of the model"
        module = self.stack[-1] if self.stack else ""
        return (
            f"{type(self.model).__name__}{'.' + module if module else ''} cannot be traced ({line}): "
            f"{type(problem).__name__}: {str(problem).strip()[:500]}\n"
            "torch.export must be able to trace the forward: no branch or loop on the values of tensors"
        )

    def _parameters(self, twin: nn.Module) -> tuple[dict[str, Parameter], dict[str, str]]:
        """Each parameter once, and the first name of every name."""
        first: dict[int, str] = {}
        names: dict[str, str] = {}
        found: dict[str, Parameter] = {}
        for name, p in twin.named_parameters(remove_duplicate=False):
            names[name] = first.setdefault(id(p), name)
            if names[name] == name:
                found[name] = Parameter(name, tuple(p.shape), p.dtype, p.requires_grad)
            else:
                found[names[name]].aliases += (name,)
        return found, names

    def _buffers(self, conversion: Conversion, used: set[str]) -> dict[str, Buffer]:
        """The real values of the buffers, in the dtype of the capture. Those that the forward does not use are kept if saved."""
        wide = self.precision == "fp64"
        values = presets.buffers_of(self.model)
        saved = {
            f"{path}.{name}" if path else name
            for path, module in self.model.named_modules()
            for name in module._buffers
            if name not in module._non_persistent_buffers_set
        }
        found = {}
        for name, held in values.items():
            if name in used or name in saved:
                found[name] = Buffer(name, held.double() if wide and held.is_floating_point() else held, name in saved)
        for name in conversion.constants.values():
            found[name] = Buffer(name, conversion.exported.constants[name], False)
        return found


def _merge_tied(body: Any) -> None:
    """One placeholder for each parameter, also where the export has one per name."""
    first: dict[str, Any] = {}
    for node in body.placeholders(PARAMETER):
        kept = first.setdefault(node.meta["path"], node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            body.graph.erase_node(node)


def _about_sizes(problem: BaseException) -> bool:
    """Whether an export failed because a size cannot be symbolic."""
    text = f"{type(problem).__name__}: {problem}"
    return any(word in text for word in ("ConstraintViolation", "Constraints violated", "GuardOnDataDependent", "not all values of"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Export warns about what is of no concern here, such as dropped guards."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
