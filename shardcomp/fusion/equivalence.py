"""Subgraphs, and the check that a kernel computes what a subgraph computes.

The check runs both on random numbers of several magnitudes. With every cast made a cast to float64, values and gradients must
agree but for rounding: then they mean the same. In the subgraph's own dtypes, nearly all outputs must have the
same bits: then the kernel rounds where the subgraph rounds. The check runs once for each structure of a subgraph.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from shardcomp.ir.interpreter import call
from shardcomp.ir.nodes import structural_key, tensor_arguments, value
from shardcomp.ir.program import B, S

aten = torch.ops.aten
AGREEMENT = 1e-12
"""How far values and gradients in float64 may be apart, relative to the largest."""
EQUAL_BITS = 0.9999
"""The share of outputs that must have the same bits."""

_MAGNITUDES = (1.0, 1e-4, 30.0, 1e4)
"""The sizes of the numbers: constants that matter for small or for large numbers alone must show."""
_ENOUGH = 2**14
"""How many outputs are compared, at least, where the sequence may be made longer for it."""
_ROWS = 2


@dataclass(frozen=True)
class Subgraph:
    """Some calls of a graph, in order: what they read from outside, and the results that are read outside."""

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    draw: Callable[[fx.Node, torch.Generator], Tensor] | None = field(default=None, compare=False)
    """Draws an input, floating ones in float64, where they cannot be any numbers of their shape."""

    def escapes(self) -> list[fx.Node]:
        """The calls whose results are used outside, though they are none of the outputs."""
        inside = set(self.nodes)
        return [n for n in self.nodes if n not in self.outputs and any(user not in inside for user in n.users)]

    def constants(self) -> list[float]:
        """The numbers that are written into the calls, each once, the smallest first."""
        leaves = _leaves([(node.args, node.kwargs) for node in self.nodes])
        return sorted({float(leaf) for leaf in leaves if type(leaf) in (int, float)})

    def key(self) -> Hashable:
        """Equal for subgraphs that compute the same."""
        number = {node: i for i, node in enumerate((*self.inputs, *self.nodes))}
        # requires_grad too, because it decides which gradients are compared.
        operands = tuple((value(node).shape, value(node).dtype, value(node).requires_grad) for node in self.inputs)
        return operands, structural_key(self.nodes, number), tuple(number[node] for node in self.outputs)

    def run(self, inputs: Mapping[fx.Node, Tensor], sizes: Mapping[sympy.Symbol, int], neutral: bool) -> list[Tensor]:
        """The outputs. neutral: what casts to a floating dtype casts to float64."""
        env: dict[fx.Node, Any] = dict(inputs)
        for node in self.nodes:
            env[node] = call(node, env, sizes, torch.float64 if neutral else None)
        return [env[node] for node in self.outputs]


def _leaves(argument: Any) -> list[Any]:
    """What a call's arguments hold, lists and dicts opened."""
    leaves: list[Any] = []
    fx.node.map_aggregate(argument, leaves.append)
    return leaves


def subgraph_between(outputs: Sequence[fx.Node], inputs: Iterable[fx.Node], inner: Callable[[fx.Node], bool]) -> Subgraph:
    """The calls that make `outputs` of `inputs`. A value that is neither among these nor made by an `inner` call is a further
    input, after them."""
    first_inputs = list(inputs)
    inside: set[fx.Node] = set()
    further: list[fx.Node] = []
    # Back from the outputs. What `inner` refuses is read from outside, unless it is an output itself.
    pending = [node for node in outputs if node not in first_inputs]
    while pending:
        node = pending.pop()
        if node in inside or node in first_inputs or node in further:
            continue
        if node not in outputs and not inner(node):
            further.append(node)
            continue
        inside.add(node)
        pending += tensor_arguments(node)
    # In the graph's order, so that the calls can be run one after another.
    order = [node for node in outputs[0].graph.nodes if node in inside or node in further]
    nodes = tuple(node for node in order if node in inside)
    read = {operand for node in nodes for operand in tensor_arguments(node)}
    return Subgraph(nodes, (*(n for n in first_inputs if n in read), *(n for n in order if n in further)), tuple(outputs))


@dataclass(frozen=True)
class Replacement:
    """A kernel's call that may replace a subgraph: `function(*args, **kwargs)`. The nodes among `args` are its inputs.

    used: the results that are the subgraph's outputs, in their order; None where there is but one result.
    """

    function: Callable[..., Any]
    args: tuple[fx.Node | None, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    used: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        return self.function.__name__

    def run(self, env: Mapping[fx.Node, Tensor]) -> list[Tensor]:
        results = self.function(*(None if a is None else env[a] for a in self.args), **self.kwargs)
        return [results] if self.used is None else [results[i] for i in self.used]

    def key(self, subgraph: Subgraph) -> Hashable:
        places = tuple(None if a is None else subgraph.inputs.index(a) for a in self.args)
        return self.name, places, tuple(self.kwargs.items()), self.used


@dataclass(frozen=True)
class MatchResult:
    """Which replacement computes what the subgraph computes; if none does, why not the nearest. The more of the check it
    passed, the higher its `progress`."""

    chosen: int | None
    reason: str = ""
    progress: int = 0


_results: dict[Hashable, MatchResult] = {}


def check_equivalent(subgraph: Subgraph, replacements: Sequence[Replacement], bits: bool = True) -> MatchResult:
    """The first replacement that passes the check. bits: whether the outputs must have the same bits as well."""
    # Layers, and the models of one family, ask the same questions again and again.
    key = (subgraph.key(), tuple(replacement.key(subgraph) for replacement in replacements), bits)
    if key not in _results:
        # The caller may run under no_grad, and the check compares gradients.
        with torch.enable_grad():
            _results[key] = _check_equivalent(subgraph, replacements, bits)
    return _results[key]


def _check_equivalent(subgraph: Subgraph, replacements: Sequence[Replacement], bits: bool) -> MatchResult:
    trials = _Trials(subgraph)
    best = MatchResult(None, "nothing was proposed", -1)
    for i, replacement in enumerate(replacements):
        failure = _tried(replacement, trials, bits)
        if failure is None:
            return MatchResult(i)
        # The replacement that failed last in the check is the nearest, and its failure tells a reader most.
        best = max(best, failure, key=lambda result: result.progress)
    return best


def _tried(replacement: Replacement, trials: _Trials, bits: bool) -> MatchResult | None:
    """What speaks against a replacement; None if nothing does."""
    name = replacement.name
    # First in float64, where only what is computed matters: the results, and then the gradients.
    for magnitude in _MAGNITUDES:
        inputs, expected, seeds, gradients = trials.wide(magnitude)
        # Leaves of its own, so that both graphs can be differentiated.
        env = {node: tensor.detach().requires_grad_(tensor.requires_grad) for node, tensor in inputs.items()}
        results = replacement.run(env)
        if [m.shape for m in results] != [e.shape for e in expected]:
            return MatchResult(None, f"it is no {name}: its results have other shapes", 0)
        apart = max(_deviation(a, b) for a, b in zip(results, expected, strict=True))
        # `not <=`, because a NaN must fail as well.
        if not apart <= AGREEMENT:
            return MatchResult(None, f"it is no {name}: in float64 they are {apart:.0e} apart", 1)
        graded = [tensor for tensor in env.values() if tensor.requires_grad]
        own_gradients = torch.autograd.grad(results, graded, seeds, allow_unused=True) if graded else ()
        apart = max((_deviation(a, b) for a, b in zip(own_gradients, gradients, strict=True)), default=0.0)
        if not apart <= AGREEMENT:
            return MatchResult(None, f"it is no {name}: in float64 their gradients are {apart:.0e} apart", 2)
    # Then in the subgraph's own dtypes, where it also matters when a number is rounded.
    inputs, expected = trials.own()
    results = replacement.run(inputs)
    if [m.dtype for m in results] != [e.dtype for e in expected]:
        return MatchResult(
            None, f"it is {name}, but its result is {_name(expected[0])}, and {name} gives {_name(results[0])}", 3
        )
    share = min(equal_bits(a, b) for a, b in zip(results, expected, strict=True))
    # Nearly all and not all: a sum over features in another order changes a few last bits.
    if bits and share < EQUAL_BITS:
        what = f"{share:.1%} of its {_name(expected[0])} results have the bits of {name}"
        return MatchResult(None, f"it is {name}, but rounds elsewhere: {what}; numerics = fp32 would take it", 4)
    return None


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def equal_bits(a: Tensor, b: Tensor) -> float:
    """The share of elements that are the same; NaN is the same as NaN."""
    alike = (a == b) | (a.isnan() & b.isnan())
    return float(alike.double().mean()) if alike.numel() else 1.0


def _deviation(result: Tensor | None, expected: Tensor | None) -> float:
    # None is the gradient of an input that was not used. Then it must be unused in both.
    if result is None or expected is None:
        return 0.0 if result is expected else float("inf")
    if not expected.numel():
        return 0.0
    largest, apart = float(expected.detach().abs().max()), float((result - expected).detach().abs().max())
    return apart / largest if largest > 0 else apart


class _Trials:
    """What a subgraph computes of random numbers, each computed when first asked for."""

    def __init__(self, subgraph: Subgraph) -> None:
        self.subgraph = subgraph
        self.sizes = _sizes(subgraph)
        self.known: dict[float, Any] = {}

    def wide(self, magnitude: float) -> tuple[dict[fx.Node, Tensor], list[Tensor], list[Tensor], list[Tensor | None]]:
        """In float64: the inputs, the outputs, gradients of the outputs, and the resulting gradients of the inputs."""
        if magnitude not in self.known:
            inputs = self._draw(magnitude, torch.float64)
            outputs = self.subgraph.run(inputs, self.sizes, neutral=True)
            # Another seed than in `_draw`: a gradient must not repeat the numbers of an input.
            draw = torch.Generator().manual_seed(1)
            seeds = [torch.randn(out.shape, generator=draw, dtype=torch.float64) for out in outputs]
            graded = [tensor for tensor in inputs.values() if tensor.requires_grad]
            gradients = torch.autograd.grad(outputs, graded, seeds, allow_unused=True) if graded else ()
            self.known[magnitude] = inputs, [out.detach() for out in outputs], seeds, list(gradients)
        return self.known[magnitude]  # type: ignore[no-any-return]

    def own(self) -> tuple[dict[fx.Node, Tensor], list[Tensor]]:
        """In the subgraph's dtypes: the inputs and the outputs."""
        # 0.0 is no magnitude, and so it can be the key of this trial.
        if 0.0 not in self.known:
            with torch.no_grad():
                inputs = {node: tensor.detach() for node, tensor in self._draw(1.0, None).items()}
                self.known[0.0] = inputs, self.subgraph.run(inputs, self.sizes, neutral=False)
        return self.known[0.0]  # type: ignore[no-any-return]

    def _draw(self, magnitude: float, dtype: torch.dtype | None) -> dict[fx.Node, Tensor]:
        draw = torch.Generator().manual_seed(0)
        inputs = {}
        for node in self.subgraph.inputs:
            tensor = value(node)
            if self.subgraph.draw is not None:
                drawn = self.subgraph.draw(node, draw)
            else:
                shape = [int(sympy.sympify(size).subs(self.sizes)) for size in tensor.shape]
                drawn = torch.randn(shape, generator=draw, dtype=torch.float64)
            if drawn.is_floating_point():
                # Always drawn in float64 first, so that the other dtypes get the same numbers, rounded.
                drawn = (magnitude * drawn).to(dtype or tensor.dtype)
            inputs[node] = drawn.requires_grad_(tensor.requires_grad)
        return inputs


def _sizes(subgraph: Subgraph) -> dict[sympy.Symbol, int]:
    """The (b, s) to run a subgraph at."""
    shape = value(subgraph.outputs[0]).shape
    one = int(sympy.sympify(sympy.prod(shape)).subs({B: _ROWS, S: 1}))
    # S = ceil(_ENOUGH / outputs per position): a share of equal bits says little about a few outputs.
    return {B: _ROWS, S: max(3, -(-_ENOUGH // max(one, 1)))}
