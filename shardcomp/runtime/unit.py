"""Units and stages at run time: `UnitParameters` has a unit's parameters, `Unit` is the base of its emitted code, `Stage`
calls the units.

Code and parameters are separate because one set of parameters serves every call signature, and each signature has its own
code.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shardcomp.errors import PlanError
from shardcomp.ir.collectives import Axis
from shardcomp.kernels.linear_cross_entropy import linear_cross_entropy
from shardcomp.runtime.linear import fan_out, linear
from shardcomp.runtime.random import Streams
from shardcomp.runtime.recompute import drop, keep, recompute

BACKEND = "inductor"
"""What torch.compile compiles with."""


def current(module: nn.Module, attribute: str) -> Tensor:
    """A parameter or buffer as it is now: gathered, while its unit runs.

    `getattr` on a `Namespace` would put the sharded parameter back first.
    """
    tensor = module._parameters.get(attribute)
    if tensor is None:
        tensor = module._buffers[attribute]
    assert tensor is not None
    return tensor


class UnitParameters(nn.Module):
    """The parameters and buffers of one unit: the module that FSDP gathers, reshards and reduce-scatters.

    places: the name in the emitted code -> (module of the model's tree, attribute).
    owned: the modules whose parameters only this unit uses. shared: where other units use some of its parameters as well.
    path, recompute: as in `UnitPlan`.
    copies_vectors: whether the code computes with copies of biases and norm weights. The second half of a split backward reads
        some of them, such as a LayerNorm's weight, after the gathered parameters are freed.
    splits: whether the schedule splits the backward. FSDP hooks the node that a result comes from, and the second half, which
        starts from that node, would run the hooks again. So each result gets a node of its own.
    main_grads: the name of a matrix in the emitted code -> its `MainGrad`.
    compute_dtype: what the code computes in. FSDP casts parameters to it; 0-d ones, which FSDP does not take, are cast here.
    """

    shared: SharedParameters | None
    compute_dtype: torch.dtype | None = None
    copies_vectors = False
    splits = False
    main_grads: Mapping[str, Any] = {}

    def __init__(
        self,
        places: Mapping[str, tuple[nn.Module, str]],
        owned: list[nn.Module],
        shared: SharedParameters | None = None,
        path: str = "",
        recompute: str = "none",
    ) -> None:
        super().__init__()
        self.path, self.recompute = path, recompute
        self.owned = nn.ModuleList(owned)
        object.__setattr__(self, "shared", shared)  # no child of this module: it belongs to the root
        self.places = dict(places)
        self.gathered: list[Tensor] = []
        """The parameters and buffers as the last forward used them."""

    def forward(self, body: Callable[..., Any], *inputs: Tensor) -> Any:
        self.gathered = [current(module, attribute) for module, attribute in self.places.values()]
        results = body(*inputs)
        if not self.splits:
            return results
        return tuple(DetachNode.apply(x) for x in results) if isinstance(results, tuple) else DetachNode.apply(results)

    def run(self, body: Callable[..., Any], *inputs: Tensor) -> Any:
        """Run `body` with all parameters of the unit gathered."""
        return self(body, *inputs) if self.shared is None or not self.shared.apart else self.shared(self, body, *inputs)


class DetachNode(torch.autograd.Function):
    """The identity, as an autograd node of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class SharedParameters(nn.Module):
    """The modules of a stage whose parameters several units use, such as a tied embedding.

    apart: whether they are resharded between those units. They are an FSDP group of their own then, gathered around each unit.
        Otherwise they belong to the root's group, whose gradients are reduced once, after all units.
    """

    def __init__(self, modules: list[nn.Module], apart: bool) -> None:
        super().__init__()
        self.owned = nn.ModuleList(modules)
        self.apart = apart

    def forward(self, unit_params: UnitParameters, body: Callable[..., Any], *inputs: Tensor) -> Any:
        return unit_params(body, *inputs)


class LocalTensorTree:
    """One level of the names in `w.self_attn.q_proj.weight`: plain attributes with local tensors. `w.experts[3]` reads the
    attribute "3", the name of a module in a list."""

    def __getitem__(self, index: int) -> Any:
        return self.__dict__[str(index)]


def local(unit: Unit | Compiled) -> Any:
    """The unit's parameters and buffers as this rank's local tensors, under their names in the model."""
    if isinstance(unit, Compiled):
        return unit.weights
    top = LocalTensorTree()
    for name, (module, attribute) in unit.unit_parameters.places.items():
        *path, leaf = name.split(".")
        at: Any = top
        for part in path:
            if part not in at.__dict__:
                setattr(at, part, LocalTensorTree())
            at = at.__dict__[part]
        tensor = current(module, attribute)
        if tensor.dim() == 0 and isinstance(tensor, nn.Parameter):
            tensor = tensor.to(unit.unit_parameters.compute_dtype)
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if name in unit.unit_parameters.main_grads:
            tensor.main_grad = unit.unit_parameters.main_grads[name]
        setattr(at, leaf, tensor.clone() if unit.unit_parameters.copies_vectors and tensor.dim() < 2 else tensor)
    return top


class Unit:
    """Base of the emitted classes. `self.tp` and the like are the axes of the mesh, `self.device` is where new tensors go,
    `self.random` is what dropout draws from."""

    def __init__(
        self, unit_parameters: UnitParameters, axes: Mapping[str, Axis], device: torch.device, random: Streams
    ) -> None:
        self.unit_parameters = unit_parameters
        self.device = device
        self.random = random
        for name, axis in axes.items():
            setattr(self, name, replace(axis, unit=unit_parameters.path))
        self.call: Callable[..., Any] = self.forward

    def compile(self) -> None:
        """Let torch.compile run the forward from now on."""
        code = compiled(type(self))
        self.call = lambda *inputs: code(Compiled(self), *inputs)

    def forward(self, *inputs: Tensor) -> Any:
        raise TypeError(f"{type(self).__name__} has no emitted forward")

    def fan_out(self, x: Tensor) -> Tensor:
        """`x` for several linear layers to read, see `runtime.linear`. Under a split backward it is plain `x`: torch tells the
        two halves apart by the gradients that autograd hands on."""
        return x if self.unit_parameters.splits or not (torch.is_grad_enabled() and x.requires_grad) else fan_out(x)

    def __call__(self, *inputs: Tensor) -> Any:
        return self.unit_parameters.run(self._run, *inputs)

    def _run(self, *inputs: Tensor) -> Any:
        if self.unit_parameters.recompute == "none":
            return self.call(*inputs)
        draws = "random" in type(self).forward.__code__.co_names  # it reads self.random
        return recompute(self.call, inputs, self.unit_parameters.path, self.random if draws else None)


class Compiled:
    """What a compiled forward sees of a unit: its axes, device, random streams and local tensors.

    These differ between alike units in numbers only, so one compilation serves all of them.
    """

    def __init__(self, unit: Unit) -> None:
        # Without the unit's own modules and functions, which would be guarded, and make every layer compile anew.
        self.__dict__.update({k: v for k, v in vars(unit).items() if k not in ("unit_parameters", "call")})
        self.weights = local(unit)

    @torch.compiler.disable
    def fan_out(self, x: Tensor) -> Tensor:
        """As `Unit.fan_out`."""
        return fan_out(x) if torch.is_grad_enabled() and x.requires_grad else x


_NOT_COMPILED = (keep, drop, linear, linear_cross_entropy)
"""Compiled code stops before these and starts again after them. Recompute watches the first two. The backwards of the last two
multiply into existing memory, and torch 2.11 does not trace some of these products for a GPU."""
_compiled: dict[tuple[type[Unit], str], Callable[..., Any]] = {}
_compiling = threading.Lock()


def compiled(code: type[Unit]) -> Callable[..., Any]:
    """The forward of a class of units under torch.compile: a function of a `Compiled` and the unit's inputs.

    Collectives, functions that draw random numbers and `_NOT_COMPILED` are not compiled, but the code around them is.
    """
    with _compiling:
        if (code, BACKEND) not in _compiled:
            forward = code.forward
            draws = "random" in forward.__code__.co_names
            disabled = {
                name: torch.compiler.disable(value)
                for name, value in forward.__globals__.items()
                if _is_not_compiled(value, draws)
            }
            # torch keeps what it compiled by code object, with the globals of the first function that had it: a copy of the
            # code object keeps this function's globals apart from the globals of the plain forward.
            own = forward.__code__.replace()
            copy = FunctionType(own, {**forward.__globals__, **disabled}, forward.__name__)
            _compiled[code, BACKEND] = torch.compile(copy, backend=BACKEND)
        return _compiled[code, BACKEND]


def probe(device: torch.device) -> None:
    """Compile a tiny function. Raises PlanError where torch.compile does not work."""
    try:
        torch.compile(lambda x: x + 1, backend=BACKEND)(torch.ones(8, device=device))
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        raise PlanError(
            f"compile = true, but torch.compile does not work on {device.type} here: {type(error).__name__}: {message}; use "
            "compile = false"
        ) from error


def _is_not_compiled(value: Any, draws: bool) -> bool:
    """Whether a global of the emitted code is a function of shardcomp's that must not be compiled. draws: whether the unit
    draws random numbers."""
    if not isinstance(value, FunctionType) or not value.__module__.startswith("shardcomp."):
        return False
    arguments = inspect.signature(value).parameters
    return value in _NOT_COMPILED or "axis" in arguments or draws and "random" in arguments


class Stage:
    """Base of the emitted stage: its units in order, `self.units`, made of the path and the class of each."""

    unit_classes: ClassVar[tuple[tuple[str, type[Unit]], ...]] = ()

    def __init__(
        self, unit_parameters: list[UnitParameters], axes: Mapping[str, Axis], device: torch.device, random: Streams
    ) -> None:
        self.device = device
        self.random = random
        pairs = zip(self.unit_classes, unit_parameters, strict=True)
        self.units = [code(unit_params, axes, device, random) for (_, code), unit_params in pairs]

    def forward(self, *received: Tensor, **inputs: Tensor) -> Any:
        """The model's results by name, or in any stage but the last, what the next stage takes."""
        raise TypeError(f"{type(self).__name__} has no emitted forward")

    def received(self, b: int, s: int) -> list[tuple[tuple[int, ...], torch.dtype, bool]]:
        """(local shape, dtype, whether its gradient is sent back) of each tensor from the stage before, for a micro-batch of
        [b, s]."""
        return []

    def sent(self, b: int, s: int) -> list[tuple[tuple[int, ...], torch.dtype, bool]]:
        """The same of each tensor for the next stage."""
        return []

    def tokens(self, **inputs: Tensor) -> Tensor:
        """The number of labels of these inputs that the loss is a mean over."""
        raise TypeError("this program was captured without labels")


class StageRoot(nn.Module):
    """FSDP's root module of a stage. Its own parameters stay gathered from the first unit to the last."""

    def __init__(self, unit_parameters: list[UnitParameters], shared: SharedParameters | None) -> None:
        super().__init__()
        self.unit_parameters = nn.ModuleList(unit_parameters)
        self.shared = shared

    def forward(self, body: Callable[..., Any], *received: Tensor, **inputs: Tensor) -> Any:
        return body(*received, **inputs)
