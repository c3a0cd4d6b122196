"""Decide for each unit what data-parallel ranks shard of its parameters: whether it reshards them after its forward, and what
the host keeps.

The pass changes the plans of units and no code. The runtime gathers and frees the parameters around a unit as its plan says.
zero = 3 reshards every unit after its forward. The host keeps the parameters that `offload` names, of all units or of those
that match a pattern. A stage whose backward cannot be split computes it in one piece, whatever the schedule asks for (see
`cost.split_backward`).

Legality: FSDP gathers the parameters of a unit before every use, wherever and over however many ranks they are kept.
"""

from __future__ import annotations

from dataclasses import replace

from shardcomp.cost.split_backward import reason_not_split
from shardcomp.errors import PolicyError
from shardcomp.ir.program import Context, Contract, Degraded, Program
from shardcomp.ir.schedules import SCHEDULES
from shardcomp.policy.options import OFFLOAD
from shardcomp.policy.patterns import nearest, parse

CONTRACT = Contract(requires=frozenset({"units", "layouts", "stages"}), provides=frozenset({"zero"}))


def run(program: Program, context: Context) -> Program:
    options = context.policy.options
    reshard = options.zero == 3
    # Only some schedules ask for the two halves of a backward.
    stages = range(program.stages if SCHEDULES[options.schedule].splits_backward else 0)
    unsplit = {stage: why for stage in stages if (why := reason_not_split(program, stage, reshard)) is not None}
    offloaded = _offloaded(program, options.offload)
    units = []
    for unit in program.units:
        plan = replace(unit.plan, whole_backward=unit.plan.stage in unsplit)
        # A prelude has none, and so there is nothing to gather.
        if unit.parameters:
            plan = replace(plan, reshard=reshard, offload=unit.path in offloaded)
        units.append(replace(unit, plan=plan))
    slower = [Degraded(f"stage {stage}", f"its backward is not split in two: {why}") for stage, why in unsplit.items()]
    return replace(program, units=units, degraded=[*program.degraded, *slower])


def _offloaded(program: Program, offload: str | tuple[str, ...]) -> set[str]:
    """The paths of the units whose parameters the host keeps. Raises PolicyError where a pattern matches none."""
    paths = [unit.path for unit in program.units if unit.parameters]
    if offload in OFFLOAD:
        return set() if offload == "none" else set(paths)
    patterns = [parse(text) for text in ((offload,) if isinstance(offload, str) else offload)]
    idle = [pattern.text for pattern in patterns if not any(pattern.matches(path) for path in paths)]
    if idle:
        close = nearest(idle[0], paths)
        hint = f"the nearest is {close}" if close else f"the units are {', '.join(paths[:8])}"
        raise PolicyError(f"offload: {', '.join(idle)} matches no unit of the model; {hint}; or use {', '.join(OFFLOAD)}")
    return {path for path in paths if any(pattern.matches(path) for pattern in patterns)}
