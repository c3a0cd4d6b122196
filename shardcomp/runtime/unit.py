"""Units and stages at run time: `Home` holds a unit's parameters, `Unit` is the base of its emitted code, `Stage` calls
the units.

Code and parameters are apart because one set of parameters serves every call signature, each of which has code of its own.
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
from shardcomp.runtime.recompute import keep, once, recompute

BACKEND = "inductor"
"""What torch.compile compiles with."""


def current(module: nn.Module, attribute: str) -> Tensor:
    """A parameter or buffer as it is now: gathered, while its unit runs. Read as an attribute, a `Namespace` gives the
    sharded one."""
    tensor = module._parameters.get(attribute)
    if tensor is None:
        tensor = module._buffers[attribute]
    assert tensor is not None
    return tensor


class UnitParameters(nn.Module):
    """The parameters and buffers of one unit, held by modules of the model's tree; what FSDP gathers and reduces.

    places: the name in the emitted code -> (module, attribute).
    owned: the modules whose parameters belong to this unit alone. shared: where others use some of its parameters as well.
    path, recompute: the unit's, see `UnitPlan`.
    copies_vectors: whether the code computes with copies of biases and of norms' weights. The second half of a split backward
    reads some of them, such as a LayerNorm's weight, when what was gathered is gone.
    splits: whether its backward comes in two halves. What FSDP hangs on the call that a result comes from would then run in
    the second half once more, where weights meet that very call: its results get a call of their own.
    wide_gradients: the name of a matrix in the emitted code -> where its gradients of several micro-batches are added up.
    compute_dtype: what its code computes in: FSDP casts all parameters to it but those of no dimension, which it does not take.
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
        object.__setattr__(self, "shared", shared)  # not a child: it is the root's
        self.places = {name: place for name, place in places.items()}
        self.gathered: list[Tensor] = []
        """The parameters and buffers as the last forward used them."""

    def forward(self, body: Callable[..., Any], *inputs: Tensor) -> Any:
        self.gathered = [current(module, attribute) for module, attribute in self.places.values()]
        results = body(*inputs)
        if not self.splits:
            return results
        return tuple(DetachNode.apply(each) for each in results) if isinstance(results, tuple) else DetachNode.apply(results)

    def run(self, body: Callable[..., Any], *inputs: Tensor) -> Any:
        """`body` with all parameters of the unit gathered."""
        return self(body, *inputs) if self.shared is None or not self.shared.apart else self.shared(self, body, *inputs)


class DetachNode(torch.autograd.Function):
    """The same numbers as the result of another call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class SharedParameters(nn.Module):
    """The modules of a stage whose parameters several units use, such as a tied embedding.

    apart: they are put back in pieces between those units: a group of their own, which is gathered around each. Else they
    belong to the root's group, whose gradients are summed once, behind all of them.
    """

    def __init__(self, modules: list[nn.Module], apart: bool) -> None:
        super().__init__()
        self.owned = nn.ModuleList(modules)
        self.apart = apart

    def forward(self, home: UnitParameters, body: Callable[..., Any], *inputs: Tensor) -> Any:
        return home(body, *inputs)


class ParameterNamespace:
    """One level of the names in `w.self_attn.q_proj.weight`: plain attributes that hold local tensors. `w.experts[3]` reads the
    attribute that a numbered module has."""

    def __getitem__(self, index: int) -> Any:
        return self.__dict__[str(index)]


def local(unit: Unit | Compiled) -> Any:
    """The unit's parameters and buffers as this rank's local tensors, under their names in the model."""
    if isinstance(unit, Compiled):
        return unit.weights
    top = ParameterNamespace()
    for name, (module, attribute) in unit.unit_parameters.places.items():
        *path, leaf = name.split(".")
        at: Any = top
        for part in path:
            if part not in at.__dict__:
                setattr(at, part, ParameterNamespace())
            at = at.__dict__[part]
        held = current(module, attribute)
        if held.dim() == 0 and isinstance(held, nn.Parameter):
            held = held.to(unit.unit_parameters.compute_dtype)
        held = held.to_local() if isinstance(held, DTensor) else held
        if name in unit.unit_parameters.main_grads:
            held.wide_gradient = unit.unit_parameters.main_grads[name]
        setattr(at, leaf, held.clone() if unit.unit_parameters.copies_vectors and held.dim() < 2 else held)
    return top


class Unit:
    """Base of the emitted classes. `self.tp` and the like are the axes of the mesh, `self.device` where tensors are made,
    `self.random` what dropout draws from."""

    def __init__(self, home: UnitParameters, axes: Mapping[str, Axis], device: torch.device, random: Streams) -> None:
        self.unit_parameters = home
        self.device = device
        self.random = random
        for name, axis in axes.items():
            setattr(self, name, replace(axis, unit=home.path))
        self.call: Callable[..., Any] = self.forward

    def compile(self) -> None:
        """From now on torch.compile runs the forward."""
        code = compiled(type(self))
        self.call = lambda *inputs: code(Compiled(self), *inputs)

    def forward(self, *inputs: Tensor) -> Any:
        raise TypeError(f"{type(self).__name__} has no emitted forward")

    def fan_out(self, x: Tensor) -> Tensor:
        """`x` for several linear layers to read, see `runtime.linear`. Not under a split backward, whose halves are told apart
        by what autograd gives to whom."""
        return x if self.unit_parameters.splits or not (torch.is_grad_enabled() and x.requires_grad) else fan_out(x)

    def __call__(self, *inputs: Tensor) -> Any:
        return self.unit_parameters.run(self._run, *inputs)

    def _run(self, *inputs: Tensor) -> Any:
        if self.unit_parameters.recompute == "none":
            return self.call(*inputs)
        draws = "random" in type(self).forward.__code__.co_names  # it reads self.random
        return recompute(self.call, inputs, self.unit_parameters.path, self.random if draws else None)


class Compiled:
    """What a compiled forward sees of a unit: its axes, where tensors are made, what dropout draws from, and its local tensors.
    Of alike units these differ in numbers only, so that one compilation serves all."""

    def __init__(self, unit: Unit) -> None:
        self.__dict__.update({name: held for name, held in vars(unit).items() if name not in ("home", "call")})
        self.weights = local(unit)

    @torch.compiler.disable
    def fan_out(self, x: Tensor) -> Tensor:
        """As that of `Unit`."""
        return fan_out(x) if torch.is_grad_enabled() and x.requires_grad else x


_AS_THEY_ARE = (keep, once, linear, linear_cross_entropy)
"""Compiled code stops before these and goes on behind: recompute watches the first two, and the gradients of the last two are
products into memory that is there already, some of which torch 2.11 does not trace for a GPU."""
_compiled: dict[tuple[type[Unit], str], Callable[..., Any]] = {}
_compiling = threading.Lock()


def compiled(code: type[Unit]) -> Callable[..., Any]:
    """The forward of a class of units under torch.compile: a function of a `Compiled` and the unit's inputs.

    What talks to other ranks, draws random numbers or is among `_AS_THEY_ARE` is not compiled, but the pieces around it are.
    """
    with _compiling:
        if (code, BACKEND) not in _compiled:
            forward = code.forward
            draws = "random" in forward.__code__.co_names
            held = {name: each for name, each in forward.__globals__.items() if _runs_as_it_is(each, draws)}
            names = {name: torch.compiler.disable(each) for name, each in held.items()}
            # What torch compiles belongs to a code object, and reads the names of the first function that has it.
            own = forward.__code__.replace()
            again = FunctionType(own, {**forward.__globals__, **names}, forward.__name__)
            _compiled[code, BACKEND] = torch.compile(again, backend=BACKEND)
        return _compiled[code, BACKEND]


def probe(device: torch.device) -> None:
    """Raise PlanError where torch.compile does not work, on what is little work."""
    try:
        torch.compile(lambda x: x + 1, backend=BACKEND)(torch.ones(8, device=device))
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        raise PlanError(
            f"compile = true, but torch.compile does not work on {device.type} here: {type(error).__name__}: {said}; use "
            "compile = false"
        ) from error


def _runs_as_it_is(held: Any, draws: bool) -> bool:
    """Whether a function of shardcomp's is not to be compiled, in a unit that draws random numbers or in one that does not."""
    if not isinstance(held, FunctionType) or not held.__module__.startswith("shardcomp."):
        return False
    given = inspect.signature(held).parameters
    return held in _AS_THEY_ARE or "axis" in given or draws and "random" in given


class Stage:
    """Base of the emitted stage: its units in order, `self.each`."""

    units: ClassVar[tuple[tuple[str, type[Unit]], ...]] = ()

    def __init__(self, homes: list[UnitParameters], axes: Mapping[str, Axis], device: torch.device, random: Streams) -> None:
        self.device = device
        self.random = random
        self.each = [code(home, axes, device, random) for (_, code), home in zip(self.units, homes, strict=True)]

    def forward(self, *received: Tensor, **inputs: Tensor) -> Any:
        """The model's results by name, or where another stage follows, what that one takes."""
        raise TypeError(f"{type(self).__name__} has no emitted forward")

    def received(self, b: int, s: int) -> list[tuple[tuple[int, ...], torch.dtype, bool]]:
        """What comes from the stage before, for a micro-batch of [b, s]: local shape, dtype, and whether its gradient goes
        back."""
        return []

    def sent(self, b: int, s: int) -> list[tuple[tuple[int, ...], torch.dtype, bool]]:
        """What goes to the stage behind, in the words of `received`."""
        return []

    def tokens(self, **inputs: Tensor) -> Tensor:
        """The number of labels of these inputs that the loss is a mean over."""
        raise TypeError("this program was captured without labels")


class StageRoot(nn.Module):
    """The module that FSDP takes for the root of all units. Its own parameters are gathered from the first unit to the last."""

    def __init__(self, homes: list[UnitParameters], shared: SharedParameters | None) -> None:
        super().__init__()
        self.unit_parameters = nn.ModuleList(homes)
        self.shared = shared

    def forward(self, body: Callable[..., Any], *received: Tensor, **inputs: Tensor) -> Any:
        return body(*received, **inputs)
