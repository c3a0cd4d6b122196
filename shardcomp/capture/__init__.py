"""A HuggingFace model as a Program: one call of it, captured as a flat graph of ATen operators and one attention operator.

The parts: `fake_model` copies the model without its data, `hf_attention` and `masks` record its attention, `vmap` a vmap,
`export` traces the call, `flatten` makes a plain graph of the trace, `functionalize` replaces its writes in place by values,
`ir.interpreter` runs a graph, `check` compares it with the model. `captured` is what is known of a call; `cache` keeps it on
disk.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from shardcomp.capture import cache
from shardcomp.capture.captured import Captured
from shardcomp.capture.check import check_after_capture, self_check
from shardcomp.capture.export import Export, explain, export, missing
from shardcomp.capture.fake_model import Twin, buffers_of, experts_of_any_dtype, has_data, parameters_of
from shardcomp.capture.flatten import flatten, mark_gradients, with_results
from shardcomp.capture.hf_attention import NAME, Recorder, registered
from shardcomp.capture.refusals import (
    RealTensors,
    foreign_parameters,
    memory,
    refuse_backward_hooks,
    refuse_sparse_gradients,
)
from shardcomp.errors import CaptureError, raise_all
from shardcomp.ir.nodes import path_of, value
from shardcomp.ir.precision import compute_dtype
from shardcomp.ir.program import BUFFER, INPUT, PARAMETER, Body, Buffer, Degraded, Program, Signature, Unit
from shardcomp.torch_private import FakeTensorMode

__all__ = ["Exports", "capture", "self_check"]

_SAMPLE = (3, 18)
"""The shape that a call is traced with where the caller names none. Neither is a size that a model is likely to have."""
_SHORTEST = (2, 4, None)
"""The least length of a sequence, tried in turn: a model that shifts its labels itself has one token fewer, and a single one is
another graph. The last, None, allows only the one shape."""
_BOTH = ("loss", "logits")
_BY_MICRO_BATCH = (
    "its frequencies depend on the largest position of a call, as in the model: where positions are given, each micro-batch of "
    "each rank has its own, so samples of other ranks and micro-batches do not change them"
)
_UNSEEN = (
    "a query that sees no key, as padding on the left has, gets zeros; the model's eager attention gives it the mean of all "
    "values, and its scores a gradient. Give the last padding position, which predicts the first token, the label -100"
)
_LOCK = threading.RLock()
"""transformers' registries are global: one capture at a time."""


def capture(
    model: nn.Module,
    signature: Signature,
    *,
    precision: str,
    sample: tuple[int, int] | None = None,
    exports: Exports | None = None,
) -> Program:
    """The Program of one call of `model`, which is left as it is: its tensors may be real or on meta, on any device.

    signature: which [b, s] int64 inputs are given, which outputs are wanted, and the mode (None: each module in its own).
    precision: bf16, fp32 or fp64; under fp64 the model's own casts to float32 are widened.
    sample: the (b, s) that is captured where the model's graph holds for a single shape only; the Program then says so in
    `static_shape` and `degraded`.
    exports: what captures of this model in this precision have exported so far, which is looked up and added to.
    A model that is not too large is run with random weights and compared with what was captured. Raises CaptureError, and
    PolicyError for an unknown precision.
    """
    wrong = [f"{name} has {ndim} dimensions" for name, ndim in signature.inputs if ndim != 2]
    if wrong:
        raise CaptureError(f"{type(model).__name__}: {', '.join(wrong)}; a capture takes [b, s] inputs")
    dtype = compute_dtype(precision)
    refuse_backward_hooks(model)
    with _LOCK:
        # Of a call with labels both results are exported, most of the work being the same, and each capture takes its own.
        outputs = tuple(dict.fromkeys((*signature.outputs, *_BOTH)))  # in the caller's order
        call = replace(signature, outputs=outputs) if "loss" in signature.outputs else signature
        shape, exports = sample or _SAMPLE, {} if exports is None else exports
        modes = None if signature.training is not None else tuple(module.training for module in model.modules())
        # A capture with free sizes serves every shape. One of a single shape serves only that shape.
        known = exports.get((call, modes, None)) or exports.get((call, modes, shape))
        if known is not None:
            return _checked(model, signature, dtype, known)
        entry = cache.entry(model, call, dtype, shape)
        known = entry.load() if entry is not None else None
        if entry is not None and known is not None:
            try:
                program = _checked(model, signature, dtype, known)
            except CaptureError:
                entry.remove()  # the model is not what it was taken for: its own export says what it is
            else:
                exports[call, modes, known.static_shape] = known
                return program
        known = _capture_anew(model, call, dtype, shape)
        exports[call, modes, known.static_shape] = known
        program = _checked(model, signature, dtype, known)
        if entry is not None:
            entry.save(known)
        return program


def _checked(model: nn.Module, signature: Signature, dtype: torch.dtype, captured: Captured) -> Program:
    """The Program of a captured call, compared with the model."""
    if not set(signature.outputs) <= set(captured.outputs):
        raise missing(model, signature, captured.outputs)
    program = _program(model, signature, dtype, captured)
    unchecked = check_after_capture(program, model)
    if unchecked is not None:
        program.degraded.append(unchecked)
    return program


@dataclass
class _WorkingExport:
    """An export that holds, and what was given up for it."""

    export: Export
    twin: Twin
    static_shape: tuple[int, int] | None
    degraded: list[Degraded]
    trained: dict[int, Tensor] = field(default_factory=dict)
    """The tensors outside of the model that it computes with and that require a gradient, by their memory."""


Exports = dict[tuple[Signature, tuple[bool, ...] | None, tuple[int, int] | None], Captured]
"""A call, the mode of every module where the call leaves each in its own, and the shape that its graph is for if that is only
one -> what was captured."""


def _capture_anew(model: nn.Module, call: Signature, dtype: torch.dtype, shape: tuple[int, int]) -> Captured:
    # The graph and its constants, without parameters: those are looked up anew for every caller.
    found = _first_that_exports(model, call, dtype, shape)
    body = flatten(found.export.program, parameters_of(model, dtype), _known_constants(found))
    constants = _constants(model, found, body)
    return Captured(body, found.export.outputs, found.export.kind, constants, found.static_shape, tuple(found.degraded))


def _first_that_exports(model: nn.Module, signature: Signature, dtype: torch.dtype, sample: tuple[int, int]) -> _WorkingExport:
    """With attention as one operator, or else with the model's own."""
    exported = _export(model, signature, dtype, sample, NAME)
    if isinstance(exported, _WorkingExport):
        return exported
    violation, failure = exported, CaptureError("")
    # The recorded attention is not the model's, so try the attention that the model is set to, and then eager.
    for attention in _own_attention(model):
        try:
            exported = _export(model, signature, dtype, sample, attention)
        except CaptureError as error:
            failure = error
            continue
        assert isinstance(exported, _WorkingExport)
        exported.degraded.insert(
            0, Degraded("attention", f"{violation}: the model's own attention and mask are captured instead")
        )
        return exported
    raise failure


def _export(
    model: nn.Module, signature: Signature, dtype: torch.dtype, sample: tuple[int, int], attention: str
) -> _WorkingExport | str:
    """Any shape before a single one. A string says why the attention that was recorded is not the model's."""
    first: str | None = None
    for shortest in _SHORTEST:
        dynamic = shortest is not None
        # Everything anew for each attempt: a failed export leaves guards on sizes and a changed twin behind.
        recorder, real = Recorder(), RealTensors(_owned(model))
        mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
        twin = Twin(model, dtype, mode, signature.training)
        twin.set_attention(attention)
        other_experts = dtype == torch.float64 and experts_of_any_dtype(twin.module, "batched_mm")
        try:
            with registered(recorder):
                shape = _SAMPLE if dynamic else sample  # a size of one would be taken for a constant
                exported = export(twin.module, mode, signature, shape, shortest, dtype == torch.float64, real)
        # Our own refusals hold for every shape.
        except CaptureError:
            raise
        except Exception as error:
            # The model misused the mask it was given, and so failed. Its own attention may still export.
            if recorder.violation is not None:
                return recorder.violation
            why = explain(error, twin.module)
            if not dynamic:
                violations = foreign_parameters(((tensor, ()) for tensor in real.met.values()), _owned(model))
                lines = "".join(f"\n  {violation}" for violation in violations)
                raise CaptureError(f"{type(model).__name__} cannot be exported: {why}{lines}") from error
            # The first failure says most: later attempts allow less and may fail for that.
            first = first or why
            continue
        violation = recorder.check(_layers(model)) if attention == NAME else None
        if violation is not None:
            return violation
        degraded = [Degraded("attention", "the model makes its mask as a [b, 1, s, s] tensor")] if recorder.dense_masks else []
        eager = getattr(getattr(model, "config", None), "_attn_implementation", None) == "eager"
        if eager and recorder.padded and attention == NAME:
            degraded.append(Degraded("attention", _UNSEEN))
        if twin.follows_positions and any(name == "position_ids" for name, _ in signature.inputs):
            degraded.append(Degraded("rope", _BY_MICRO_BATCH))
        if other_experts:
            degraded.append(
                Degraded("experts", "the model's own implementation takes no float64: batched_mm is captured instead")
            )
        if not dynamic:
            degraded.append(Degraded("shape", f"the model exports for (b, s) = {sample} alone: {first}"))
        trained = {key: tensor for key, tensor in real.met.items() if tensor.requires_grad}
        return _WorkingExport(exported, twin, None if dynamic else sample, degraded, trained)
    raise AssertionError("an export without dynamic shapes returns or raises")


def _layers(model: nn.Module) -> int:
    return getattr(getattr(model, "config", None), "num_hidden_layers", 0)


def _own_attention(model: nn.Module) -> list[str]:
    """The model's own implementations that can be exported, what it is set to first."""
    own = getattr(getattr(model, "config", None), "_attn_implementation", None)
    preferred = own if own in ("sdpa", "eager") else "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    return list(dict.fromkeys((preferred, "eager")))


def _program(model: nn.Module, signature: Signature, dtype: torch.dtype, captured: Captured) -> Program:
    """A captured graph as a Program of one unit, with the results that the signature asks for."""
    parameters = parameters_of(model, dtype)
    body = with_results(captured.body, [name in signature.outputs for name in captured.outputs])
    mark_gradients(body, parameters)
    refuse_sparse_gradients(type(model).__name__, body)
    inputs = {path_of(node): value(node) for node in body.placeholders(INPUT)}
    outputs = {key: value(node) for key, node in zip(signature.outputs, body.results, strict=True)}
    constants = {path_of(node): node for node in body.placeholders(BUFFER) if path_of(node) in captured.constants}
    unit = Unit(
        path="",
        kind="model",
        body=body,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        parameters=tuple(path_of(node) for node in body.placeholders(PARAMETER)),
        buffers=tuple(path_of(node) for node in body.placeholders(BUFFER)),
    )
    return Program(
        name=type(model).__name__,
        signature=signature,
        units=[unit],
        inputs=inputs,
        outputs={key: key for key in outputs},
        values=inputs | outputs,
        parameters=parameters,
        buffers=buffers_of(model, dtype)
        | {
            name: Buffer(name, captured.constants[name].detach().to("cpu", value(node).dtype, copy=True), persistent=False)
            for name, node in constants.items()
        },
        output_type=captured.output_type,
        config=getattr(model, "config", None),
        static_shape=captured.static_shape,
        degraded=list(captured.degraded),
    )


def _owned(module: nn.Module) -> dict[int, str]:
    """The memory of every parameter -> its name."""
    # Reversed, so that the first of several names for one memory stays.
    return {memory(parameter): name for name, parameter in reversed(list(module.named_parameters()))}


def _known_constants(exported: _WorkingExport) -> dict[str, tuple[str, str]]:
    """The constants of an export that are parameters or buffers of the twin, which a function holds: name -> (role, name)."""
    module = exported.twin.module
    known = {_identity(buffer): (BUFFER, name) for name, buffer in module.named_buffers()}
    known |= {_identity(parameter): (PARAMETER, name) for name, parameter in module.named_parameters()}
    constants = {name: _identity(tensor) for name, tensor in exported.export.program.constants.items()}
    return {name: known[identity] for name, identity in constants.items() if identity in known}


def _identity(tensor: Tensor) -> Hashable:
    """Equal for two tensors that are one, but not for a tensor and a part of it."""
    return memory(tensor), tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset(), tensor.dtype


def _constants(model: nn.Module, exported: _WorkingExport, body: Body) -> dict[str, Tensor]:
    """Tensors that the model makes or holds outside of its buffers and that its graph reads.

    Raises CaptureError, with every violation, for one that is a parameter or that has no data.
    """
    specs = exported.export.program.graph_signature.input_specs
    # Of the constants, only those that the graph still reads: `flatten` dropped dead code.
    names = {str(spec.target) for spec in specs if spec.kind == InputKind.CONSTANT_TENSOR}
    constants: dict[str, Tensor] = {}
    read: dict[str, fx.Node] = {}
    for node in body.placeholders(BUFFER):
        name = path_of(node)
        if name in names:
            constant: Tensor = exported.export.program.constants[name]
            original = None if has_data(constant) else exported.twin.original(constant)
            constants[name], read[name] = constant if original is None else original, node
    users = {name: [path_of(user) for user in node.users if user.op == "call_function"] for name, node in read.items()}
    # An export detaches its constants: which of them require a gradient was noted while it ran.
    wanting = {name for name, constant in constants.items() if memory(constant) in exported.trained}
    met = ((c.detach().requires_grad_() if name in wanting else c, users[name]) for name, c in constants.items())
    raise_all(CaptureError, exported.twin.name, foreign_parameters(met, _owned(exported.twin.module) | _owned(model)))
    absent = [name for name, constant in constants.items() if not has_data(constant)]
    advice = "is not a buffer and has no data: build the model off meta"
    raise_all(CaptureError, exported.twin.name, (f"the tensor {name} {advice}" for name in absent))
    return constants
