"""What one rank has of a stage (`StageShard`), and of a single parameter (`LocalShard`)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.distributed.fsdp import FSDPModule

from shardcomp.runtime.blueprint import UnitPlan
from shardcomp.runtime.unit import StageRoot, UnitParameters


@dataclass(frozen=True)
class StageShard:
    """One rank's parameters of one stage: a `UnitParameters` for each unit, and the module that is FSDP's root.

    names: a parameter's name in the model -> its name on this rank. They differ for the second copy of a tied weight.
    scalar_places: the (module, attribute) of each 0-d parameter. FSDP does not take these: every dp rank has them, in the
        masters' dtype.
    """

    index: int
    units: tuple[UnitPlan, ...]
    unit_parameters: list[UnitParameters]
    root: StageRoot
    names: dict[str, str]
    scalar_places: tuple[tuple[nn.Module, str], ...] = ()

    @property
    def scalars(self) -> list[nn.Parameter]:
        """The 0-d parameters."""
        return [p for module, leaf in self.scalar_places if (p := module._parameters[leaf]) is not None]

    @property
    def groups(self) -> list[FSDPModule]:
        """The modules that FSDP gathers, one gather each: in the order of the forward, the shared ones last."""
        return [module for module in (*self.unit_parameters, self.root.shared, self.root) if isinstance(module, FSDPModule)]

    def users(self, module: nn.Module) -> list[UnitPlan]:
        """The units that use the parameters of a group."""
        module = self.root.shared if module is self.root and self.root.shared else module
        return [
            unit
            for unit, unit_params in zip(self.units, self.unit_parameters, strict=True)
            if module in (unit_params, unit_params.shared)
        ]

    def reshards(self, module: nn.Module) -> bool:
        """Whether a group is resharded after its forward, and gathered again for its backward."""
        return all(unit.reshard for unit in self.users(module))

    def offloads(self, module: nn.Module) -> bool:
        """Whether a group's parameters, gradients and optimizer states are in the memory of the host."""
        return all(unit.offload for unit in self.users(module))

    @property
    def whole_backward(self) -> bool:
        """Whether the gradients of inputs and weights are computed together, also under a schedule that splits them."""
        return any(unit.whole_backward for unit in self.units)


@dataclass(frozen=True)
class LocalShard:
    """One rank's shard of a parameter.

    shape: of the full parameter. index: the slice of it that this rank has. parameters: the DTensors of the shard. There are
    two where the rank has both stages that use a tied weight.
    """

    shape: tuple[int, ...]
    index: tuple[slice, ...]
    parameters: tuple[nn.Parameter, ...]
