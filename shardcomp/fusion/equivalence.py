"""Pieces of a graph, and the proof that a kernel computes what a piece computes.

The proof runs both on random numbers of several magnitudes. With every cast made a cast to float64, values and gradients must
agree but for rounding: then the piece means what the kernel does. In the piece's own dtypes, nearly all outputs must have the
same bits: then the kernel rounds where the piece rounds. It runs once for each structure of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from shardcomp.ir.interpreter import call
from shardcomp.ir.program import B, S, tensor_arguments, value

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
    """Some calls of a graph, in order: what they read from outside, and those of their results that are meant."""

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
        found: set[float] = set()
        for node in self.nodes:
            fx.node.map_aggregate((node.args, node.kwargs), lambda a: found.add(float(a)) if type(a) in (int, float) else None)  # type: ignore[func-returns-value]
        return sorted(found)

    def key(self) -> Hashable:
        """Equal for pieces that compute the same."""
        number = {node: i for i, node in enumerate((*self.inputs, *self.nodes))}
        lines = tuple(
            (str(node.target), repr(fx.map_arg((node.args, node.kwargs), lambda a: _Number(number[a])))) for node in self.nodes
        )
        held = tuple((value(node).shape, value(node).dtype, value(node).requires_grad) for node in self.inputs)
        return held, lines, tuple(number[node] for node in self.outputs)

    def run(self, given: Mapping[fx.Node, Tensor], sizes: Mapping[sympy.Symbol, int], neutral: bool) -> list[Tensor]:
        """The outputs. neutral: what casts to a floating dtype casts to float64."""
        env: dict[fx.Node, Any] = dict(given)
        for node in self.nodes:
            env[node] = call(node, env, sizes, torch.float64 if neutral else None)
        return [env[node] for node in self.outputs]


class _Number:
    def __init__(self, index: int) -> None:
        self.index = index

    def __repr__(self) -> str:
        return f"%{self.index}"


def subgraph_between(outputs: Sequence[fx.Node], inputs: Iterable[fx.Node], inner: Callable[[fx.Node], bool]) -> Subgraph:
    """The calls that make `outputs` of `inputs`. A value that is neither among these nor made by an `inner` call is a further
    input, behind them."""
    given = list(inputs)
    found: set[fx.Node] = set()
    further: list[fx.Node] = []
    pending = [node for node in outputs if node not in given]
    while pending:
        node = pending.pop()
        if node in found or node in given or node in further:
            continue
        if node not in outputs and not inner(node):
            further.append(node)
            continue
        found.add(node)
        pending += tensor_arguments(node)
    order = [node for node in outputs[0].graph.nodes if node in found or node in further]
    nodes = tuple(node for node in order if node in found)
    read = {operand for node in nodes for operand in tensor_arguments(node)}
    return Subgraph(nodes, (*(n for n in given if n in read), *(n for n in order if n in further)), tuple(outputs))


@dataclass(frozen=True)
class Replacement:
    """A kernel's call in the place of a piece: `function(*args, **kwargs)`, the nodes among `args` being inputs of the piece.

    used: the results that are the piece's outputs, in their order; None where there is but one result.
    """

    function: Callable[..., Any]
    args: tuple[fx.Node | None, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    used: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        return self.function.__name__

    def run(self, env: Mapping[fx.Node, Tensor]) -> list[Tensor]:
        made = self.function(*(None if a is None else env[a] for a in self.args), **self.kwargs)
        return [made] if self.used is None else [made[i] for i in self.used]

    def key(self, piece: Subgraph) -> Hashable:
        places = tuple(None if a is None else piece.inputs.index(a) for a in self.args)
        return self.name, places, tuple(self.kwargs.items()), self.used


@dataclass(frozen=True)
class MatchResult:
    """Which of the proposals computes what the piece computes; if none does, why not the nearest: the further a proposal got,
    the higher its `progress`."""

    chosen: int | None
    reason: str = ""
    progress: int = 0


_verdicts: dict[Hashable, MatchResult] = {}


def check_equivalent(piece: Subgraph, proposals: Sequence[Replacement], bits: bool = True) -> MatchResult:
    """The first of the proposals that passes the proof. bits: whether the outputs must have the same bits as well."""
    key = (piece.key(), tuple(proposal.key(piece) for proposal in proposals), bits)
    if key not in _verdicts:
        with torch.enable_grad():
            _verdicts[key] = _check_equivalent(piece, proposals, bits)
    return _verdicts[key]


def _check_equivalent(piece: Subgraph, proposals: Sequence[Replacement], bits: bool) -> MatchResult:
    trials = _Trials(piece)
    best = MatchResult(None, "nothing was proposed", -1)
    for i, proposal in enumerate(proposals):
        verdict = _tried(proposal, trials, bits)
        if verdict is None:
            return MatchResult(i)
        best = max(best, verdict, key=lambda each: each.progress)
    return best


def _tried(proposal: Replacement, trials: _Trials, bits: bool) -> MatchResult | None:
    """What speaks against a proposal; None if nothing does."""
    name = proposal.name
    for magnitude in _MAGNITUDES:
        given, expected, seeds, gradients = trials.wide(magnitude)
        env = {node: held.detach().requires_grad_(held.requires_grad) for node, held in given.items()}
        made = proposal.run(env)
        if [m.shape for m in made] != [e.shape for e in expected]:
            return MatchResult(None, f"it is no {name}: its results have other shapes", 0)
        apart = max(_deviation(a, b) for a, b in zip(made, expected, strict=True))
        if not apart <= AGREEMENT:
            return MatchResult(None, f"it is no {name}: in float64 they are {apart:.0e} apart", 1)
        graded = [held for held in env.values() if held.requires_grad]
        found = torch.autograd.grad(made, graded, seeds, allow_unused=True) if graded else ()
        apart = max((_deviation(a, b) for a, b in zip(found, gradients, strict=True)), default=0.0)
        if not apart <= AGREEMENT:
            return MatchResult(None, f"it is no {name}: in float64 their gradients are {apart:.0e} apart", 2)
    given, expected = trials.own()
    made = proposal.run(given)
    if [m.dtype for m in made] != [e.dtype for e in expected]:
        return MatchResult(
            None, f"it is {name}, but its result is {_name(expected[0])}, and that of {name} {_name(made[0])}", 3
        )
    share = min(equal_bits(a, b) for a, b in zip(made, expected, strict=True))
    if bits and share < EQUAL_BITS:
        what = f"{share:.1%} of its {_name(expected[0])} results have the bits of {name}"
        return MatchResult(None, f"it is {name}, but rounds elsewhere: {what}; numerics = fp32 would take it", 4)
    return None


def _name(held: Tensor) -> str:
    return str(held.dtype).removeprefix("torch.")


def equal_bits(a: Tensor, b: Tensor) -> float:
    """The share of elements that are the same; NaN is the same as NaN."""
    alike = (a == b) | (a.isnan() & b.isnan())
    return float(alike.double().mean()) if alike.numel() else 1.0


def _deviation(made: Tensor | None, expected: Tensor | None) -> float:
    if made is None or expected is None:
        return 0.0 if made is expected else float("inf")
    if not expected.numel():
        return 0.0
    largest, apart = float(expected.detach().abs().max()), float((made - expected).detach().abs().max())
    return apart / largest if largest > 0 else apart


class _Trials:
    """What a piece computes of random numbers, each computed when first asked for."""

    def __init__(self, piece: Subgraph) -> None:
        self.piece = piece
        self.sizes = _sizes(piece)
        self.known: dict[float, Any] = {}

    def wide(self, magnitude: float) -> tuple[dict[fx.Node, Tensor], list[Tensor], list[Tensor], list[Tensor | None]]:
        """In float64: the inputs, the outputs, gradients of the outputs, and those of the inputs that have one."""
        if magnitude not in self.known:
            given = self._draw(magnitude, torch.float64)
            outputs = self.piece.run(given, self.sizes, neutral=True)
            draw = torch.Generator().manual_seed(1)
            seeds = [torch.randn(out.shape, generator=draw, dtype=torch.float64) for out in outputs]
            graded = [held for held in given.values() if held.requires_grad]
            found = torch.autograd.grad(outputs, graded, seeds, allow_unused=True) if graded else ()
            self.known[magnitude] = given, [out.detach() for out in outputs], seeds, list(found)
        return self.known[magnitude]  # type: ignore[no-any-return]

    def own(self) -> tuple[dict[fx.Node, Tensor], list[Tensor]]:
        """In the piece's dtypes: the inputs and the outputs."""
        if 0.0 not in self.known:
            with torch.no_grad():
                given = {node: held.detach() for node, held in self._draw(1.0, None).items()}
                self.known[0.0] = given, self.piece.run(given, self.sizes, neutral=False)
        return self.known[0.0]  # type: ignore[no-any-return]

    def _draw(self, magnitude: float, dtype: torch.dtype | None) -> dict[fx.Node, Tensor]:
        draw = torch.Generator().manual_seed(0)
        found = {}
        for node in self.piece.inputs:
            held = value(node)
            if self.piece.draw is not None:
                drawn = self.piece.draw(node, draw)
            else:
                shape = [int(sympy.sympify(size).subs(self.sizes)) for size in held.shape]
                drawn = torch.randn(shape, generator=draw, dtype=torch.float64)
            if drawn.is_floating_point():
                drawn = (magnitude * drawn).to(dtype or held.dtype)
            found[node] = drawn.requires_grad_(held.requires_grad)
        return found


def _sizes(piece: Subgraph) -> dict[sympy.Symbol, int]:
    """The (b, s) to run a piece at."""
    shape = value(piece.outputs[0]).shape
    one = int(sympy.sympify(sympy.prod(shape)).subs({B: _ROWS, S: 1}))
    return {B: _ROWS, S: max(3, -(-_ENOUGH // max(one, 1)))}
