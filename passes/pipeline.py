"""Assign units to pipeline stages, and let each stage recompute what is too cheap to send.

A stage begins before a unit of the kind "layer". What is between two layers stays with the second, and what follows the
last layer is in the last stage. Each stage has at least one layer. `stage_layers` says how many; otherwise the slowest stage is
made as fast as it can be (see `INTENSITY`).

A value that a later stage uses is sent from stage to stage on the way (`Program.received`). Some values need no gradient and
come from no parameter, message or random draw, such as rotary tables, positions and masks. The stage recomputes those, in a
unit of its own: a copy of the unit that makes them, without what they do not need.

Legality: stages run in the order of the units, so every value is computed before it is received. What is recomputed has the
same operands, the caller's inputs and buffers, and so is the same; no gradient flows through it.

    First -> h, cos, sin; Layer(h, cos, sin) × 4        First; Layer(h, cos, sin) × 2 | Prelude -> c, s; Layer(h, c, s) × 2
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import sympy
import torch
from torch import fx

from shardcomp.cost.flops import Share, of_node
from shardcomp.errors import InternalError, PlanError
from shardcomp.ir.collectives import EXCHANGES
from shardcomp.ir.nodes import ancestors, form_of, path_of, requires_grad, role_of, value, values
from shardcomp.ir.program import BUFFER, INPUT, LAYER, PARAMETER, PRELUDE, B, Body, Context, Contract, Plan, Program, S, Unit
from shardcomp.ir.schedules import SCHEDULES
from shardcomp.passes.recompute import is_dear, kinds

CONTRACT = Contract(requires=frozenset({"canonical", "units", "layouts"}), provides=frozenset({"stages"}))

INTENSITY = 200.0
"""Operations that a device does while it moves one byte of its memory: 156 on an A100, 295 on an H100, in bf16. A call takes as
long as the slower of the two; only the ratio of units' costs matters."""


def run(program: Program, context: Context) -> Program:
    stages = context.policy.options.stages
    if stages == 1 and context.policy.options.stage_layers is None:
        return program
    atoms = _atoms(program.units)
    asked = context.policy.options.stage_layers
    # `_atoms` gives one group even where there is no layer to put into a stage.
    _check(len(atoms) if any(unit.kind == LAYER for unit in program.units) else 0, context.policy.options)
    if asked is None:
        costs = _costs(program, context)
        ends = balance([sum(costs[id(unit)] for unit in atom) for atom in atoms], stages)
    else:
        ends = list(accumulate(asked))
    units = []
    for stage, (begin, end) in enumerate(pairwise([0, *ends])):
        for unit in (unit for atom in atoms[begin:end] for unit in atom):
            units.append(replace(unit, plan=replace(unit.plan, stage=stage)))
    return _recompute(replace(program, units=units))


def _atoms(units: list[Unit]) -> list[list[Unit]]:
    """The groups of units between which a stage may begin, in order: a layer with what is before it; the last also has what
    follows."""
    atoms: list[list[Unit]] = []
    waiting: list[Unit] = []
    for unit in units:
        waiting.append(unit)
        if unit.kind == LAYER:
            atoms.append(waiting)
            waiting = []
    if atoms:
        # The final norm and the head stay with the last layer.
        atoms[-1] += waiting
    return atoms or [waiting]


def _check(layers: int, options: Any) -> None:
    """Raise PlanError where the stages cannot be had from so many layers."""
    pipeline, virtual = options.pipeline, options.virtual_stages
    if layers < options.stages:
        product = f"pipeline × virtual_stages = {pipeline} × {virtual}" if virtual > 1 else f"pipeline = {pipeline}"
        few = f"{layers} layer{'' if layers == 1 else 's'}"
        schedule = SCHEDULES[options.schedule]
        chosen = schedule.interleaves and virtual > 1
        # With virtual stages, pipeline = 1 is a hint of its own, at the end of the list.
        least, most = 2 if chosen else 1, max(1, layers // virtual)
        hints = [f"pipeline = {_listed(range(least, most + 1))}"] if most >= least else []
        if chosen and layers >= pipeline:
            hints.append(f"virtual_stages = {_listed(range(1, layers // pipeline + 1))}")
        # A V-shaped schedule always has two stages per rank. One with a single stage per rank needs half as many layers.
        elif schedule.v_shaped and layers >= pipeline:
            hints.append(f"schedule = {next(name for name, other in SCHEDULES.items() if other.stages_per_rank == 1)}")
        hints += ["pipeline = 1 without virtual_stages"] if chosen else []
        raise PlanError(
            f"{product} makes {options.stages} stages, but the model has {few} and each stage needs one: "
            f"use {', or '.join(hints)}"
        )
    if options.stage_layers is not None and sum(options.stage_layers) != layers:
        asked = ",".join(map(str, options.stage_layers))
        raise PlanError(
            f"stage_layers = {asked} makes {sum(options.stage_layers)} layers, but the model has {layers}: "
            f"give {options.stages} numbers that add up to {layers}"
        )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _costs(program: Program, context: Context) -> dict[int, float]:
    """By the id of each unit: what a rank takes for its forward, its backward and what that recomputes, in operations."""
    share = Share(program.mesh.as_dict())
    batch, length = program.static_shape or (context.batch, context.length)
    sizes = {B: batch, S: length}

    def operations(work: Any) -> float:
        # A call is bound by arithmetic or by memory: time ∝ max(flops, INTENSITY · bytes).
        flops, traffic = (float(sympy.sympify(amount).subs(sizes)) for amount in (work.flops, work.bytes))
        return max(flops, INTENSITY * traffic)

    totals: dict[tuple[int, str], float] = {}
    for body in program.bodies():
        costs = [(node, of_node(node, share)) for node in body.calls()]
        forward = [(node, operations(cost.forward)) for node, cost in costs]
        once = sum(amount for _, amount in forward) + sum(operations(cost.backward) for _, cost in costs)
        # What is recomputed runs a second time, in the backward.
        totals[id(body), "none"] = once
        totals[id(body), "full"] = once + sum(amount for _, amount in forward)
        totals[id(body), "selective"] = once + sum(amount for node, amount in forward if not is_dear(node))
    recompute_kinds = kinds(program, context.policy.options.recompute)
    return {id(unit): totals[id(unit.body), recompute_kinds.get(id(unit), "none")] for unit in program.units}


def balance(costs: Sequence[float], stages: int) -> list[int]:
    """Where each of `stages` runs of `costs` ends, so that the largest sum of a run is as small as it can be. Among those, the
    runs are as even as they can be. No run is empty."""
    sums = [0.0, *accumulate(costs)]
    count = len(costs)

    def best(limit: float, power: int) -> tuple[float, list[int]]:
        """The stage boundaries with the smallest largest sum (power 0), or the smallest sum of squares with no sum above
        `limit`."""
        # table[stage][end]: the best value of splitting the first `end` costs into `stage` runs; begins[stage][end]: where the
        # last of those runs begins. The best split of all costs is read backwards from there.
        infinite = float("inf")
        table = [[infinite] * (count + 1) for _ in range(stages + 1)]
        begins = [[0] * (count + 1) for _ in range(stages + 1)]
        table[0][0] = 0.0
        for stage in range(1, stages + 1):
            # At least one cost for each run before this one, and for each run after it.
            for end in range(stage, count - (stages - stage) + 1):
                for begin in range(stage - 1, end):
                    segment = sums[end] - sums[begin]
                    if segment > limit:
                        continue
                    before = table[stage - 1][begin]
                    # For sums that add up to the same total, the smallest sum of squares is the most even split.
                    total = max(before, segment) if power == 0 else before + segment * segment
                    if total < table[stage][end]:
                        table[stage][end], begins[stage][end] = total, begin
        ends, at = [], count
        for stage in range(stages, 0, -1):
            ends.append(at)
            at = begins[stage][at]
        return table[stages][count], ends[::-1]

    # First the smallest possible maximum, then the most even split that keeps to it.
    least, _ = best(float("inf"), 0)
    return best(least, 2)[1]


@dataclass(frozen=True)
class _Source:
    """Where a value comes from: the unit that makes it, and which of its results it is."""

    unit: Unit
    index: int


def _recompute(program: Program) -> Program:
    """Give every stage units of its own for the values of earlier stages that cost nothing to recompute."""
    sources = {name: _Source(unit, index) for unit in program.units for index, name in enumerate(unit.outputs)}
    builder = _PreludeBuilder(program, sources)
    units: list[Unit] = []
    for stage in range(program.stages):
        units_here = program.in_stages((stage,))
        names: dict[str, str] = {}
        preludes = builder.preludes(stage, [name for unit in units_here for name in unit.inputs], names)
        # The units of this stage read the recomputed values under their new names.
        rewired = [replace(unit, inputs=tuple(names.get(name, name) for name in unit.inputs)) for unit in units_here]
        units += [*preludes, *rewired]
    return replace(program, units=units, values=builder.values)


@dataclass(frozen=True)
class _Prelude:
    """The code for some results of a unit: which of the unit's inputs and buffers it takes, and which inputs of the model, only
    for their sizes."""

    body: Body
    inputs: tuple[int, ...]
    size_inputs: tuple[str, ...]
    buffers: tuple[int, ...]


class _PreludeBuilder:
    """Makes the units that recompute values of an earlier stage."""

    def __init__(self, program: Program, sources: dict[str, _Source]) -> None:
        self.program, self.sources = program, sources
        self.values = dict(program.values)
        self.free: dict[str, bool] = {}
        self.bodies: dict[Hashable, _Prelude] = {}

    def preludes(self, stage: int, value_names: Sequence[str], names: dict[str, str]) -> list[Unit]:
        """The units that recompute what they can of `value_names`; `names` then has the new name of each such value."""
        needed: set[str] = set()
        pending = list(value_names)
        while pending:
            name = pending.pop()
            if name in needed or not self._from_before(name, stage) or not self._is_free(name):
                continue
            needed.add(name)
            # What the value is computed from in its unit may be a value of an earlier stage, too.
            source = self.sources[name]
            results = source.unit.body.results
            nodes = ancestors([results[source.index]])
            pending += [n for n, p in _named_placeholders(source.unit.inputs, source.unit.body, INPUT) if p in nodes]
        preludes = []
        # In the order of the units, so that a prelude comes after the preludes that it reads.
        for unit in self.program.units:
            names_here = [name for name in unit.outputs if name in needed]
            if names_here:
                preludes.append(self._prelude(stage, unit, names_here, names))
        return preludes

    def _from_before(self, name: str, stage: int) -> bool:
        return name in self.sources and self.sources[name].unit.plan.stage < stage

    def _is_free(self, name: str) -> bool:
        """Whether a value needs no gradient and comes from the caller's inputs and buffers by calculation only."""
        # The caller's inputs are given to every stage that reads them.
        if name not in self.sources:
            return name in self.program.inputs
        if name not in self.free:
            unit, result = self.sources[name].unit, self.sources[name].index
            nodes = ancestors([unit.body.results[result]])
            read = [n for n, placeholder in _named_placeholders(unit.inputs, unit.body, INPUT) if placeholder in nodes]
            self.free[name] = all(_is_calculation(node) for node in nodes) and all(self._is_free(n) for n in read)
        return self.free[name]

    def _prelude(self, stage: int, unit: Unit, names_here: list[str], names: dict[str, str]) -> Unit:
        """A copy of `unit` that makes only the values `names_here`."""
        # Stages that recompute the same results of the same body share the code.
        key = (id(unit.body), tuple(unit.outputs.index(name) for name in names_here))
        if key not in self.bodies:
            self.bodies[key] = self._body(unit, key[1])
        code = self.bodies[key]
        for name in names_here:
            names[name] = self._new_name(name)
        read = tuple(names.get(unit.inputs[i], unit.inputs[i]) for i in code.inputs)
        return Unit(
            _module(unit, code.body),
            PRELUDE,
            code.body,
            (*read, *code.size_inputs),
            tuple(names[name] for name in names_here),
            buffers=tuple(unit.buffers[i] for i in code.buffers),
            plan=Plan(stage=stage),
        )

    def _body(self, unit: Unit, results: tuple[int, ...]) -> _Prelude:
        """The code for some results of a unit."""
        results_kept = [unit.body.results[i] for i in results]
        nodes = ancestors(results_kept)
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        inputs, buffers = ([p for p in unit.body.placeholders(role) if p in nodes] for role in (INPUT, BUFFER))
        for node in inputs:
            copies[node] = _copy(graph, node, copies)
        # Code takes b and s from its inputs. `arange(s)` reads none, so an input of the model is passed for its size alone.
        known = {size for node in inputs for size in value(node).shape}
        size_inputs: list[str] = []
        for symbol in sorted(_symbols(nodes) - known, key=str):
            name = next((n for n, input_value in self.program.inputs.items() if symbol in input_value.shape), None)
            if name is None:
                raise InternalError(f"pipeline: no input of the model has {symbol} as a dimension")
            if name not in size_inputs:
                size_inputs.append(name)
                node = graph.placeholder(name)
                node.meta = {"role": INPUT, "path": name, "value": self.program.inputs[name]}
        # After the inputs, `size_inputs` among them: `Unit` wants its inputs in the order of the placeholders.
        for node in (*buffers, *(call for call in unit.body.calls() if call in nodes)):
            copies[node] = _copy(graph, node, copies)
        graph.output(tuple(copies[node] for node in results_kept))
        name = "Prelude" if not self.bodies else f"Prelude{len(self.bodies) + 1}"
        return _Prelude(
            Body(name, graph), _indices(inputs, unit.body, INPUT), tuple(size_inputs), _indices(buffers, unit.body, BUFFER)
        )

    def _new_name(self, name: str) -> str:
        # cos_1 becomes cos_2, not cos_1_1.
        stem, _, number = name.rpartition("_")
        base = stem if stem and number.isdigit() else name
        count = 1
        while (new_name := f"{base}_{count}") in self.values:
            count += 1
        self.values[new_name] = self.values[name]
        return new_name


def _indices(some: list[fx.Node], body: Body, role: str) -> tuple[int, ...]:
    every = body.placeholders(role)
    return tuple(every.index(node) for node in some)


def _named_placeholders(names: tuple[str, ...], body: Body, role: str) -> Iterator[tuple[str, fx.Node]]:
    return zip(names, body.placeholders(role), strict=True)


def _is_calculation(node: fx.Node) -> bool:
    """Whether a node has the same value wherever it is computed, requires no gradient and communicates nothing."""
    if requires_grad(node):
        return False
    if node.op == "placeholder":
        # A parameter is only on the ranks of its own stage.
        return bool(role_of(node) != PARAMETER)
    if "random" in node.kwargs or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return False
    if node.target in EXCHANGES:
        # No gradient flows here, so its backward never runs: without a message in the forward it sends nothing.
        return EXCHANGES[node.target].forward is None
    # A split form sends messages of its own.
    return form_of(node) is None


def _copy(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    copy = graph.node_copy(node, lambda n: copies[n])
    copy.meta = dict(node.meta)
    return copy


def _symbols(nodes: set[fx.Node]) -> set[Any]:
    """The sizes that the code of these nodes may name."""
    symbols: set[Any] = set()
    for node in nodes:
        if node.op == "call_function":
            sizes = [size for result in values(node) for size in result.shape]
            fx.node.map_aggregate((node.args, node.kwargs, sizes), lambda a: symbols.update(getattr(a, "free_symbols", ())))
    return symbols


def _module(unit: Unit, body: Body) -> str:
    """The module whose values a body recomputes: the innermost one with all of them."""
    paths = [path_of(node) for node in body.results]
    parts = paths[0].split(".")
    # With the dot, so that `layers.1` does not hold `layers.10`.
    while parts and not all((path + ".").startswith(".".join(parts) + ".") for path in paths):
        parts.pop()
    inner = ".".join(parts)
    return ".".join(part for part in (unit.path, inner) if part) if unit.kind == LAYER else inner or unit.path
