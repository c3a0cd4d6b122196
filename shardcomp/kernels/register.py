"""Registration of a fused operator. `define` takes a schema, a reference in plain PyTorch, and the shapes of the results;
`differentiate` takes the gradient; `register` takes what the compiler must know.

The reference is the specification, and it runs wherever no kernel is registered. Graphs therefore always contain these
operators, whether or not a library exists. The library that `library.py` loads registers kernels for the CPU under the same
names; they then run in graphs that exist already, too. For other devices `device_check.py` does this, operator by operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from shardcomp.ir import operators
from shardcomp.kernels import device_check, small_cases
from shardcomp.sharding.notation import parse
from shardcomp.sharding.rules import RULES, Factoring, Form, Rule

LIBRARY = torch.library.Library("shardcomp", "FRAGMENT")
_WAITING = [torch.library.Library(space, "FRAGMENT") for space in device_check.SPACES.values()]
REFERENCES: dict[str, Callable[..., Any]] = {}
"""Operator -> its reference."""
FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""Name -> function, for the functions that programs and optimizers call."""


def define(schema: str, reference: Callable[..., Any], shapes: Callable[..., Any]) -> None:
    """Define `torch.ops.shardcomp.<name>`.

    Args:
        schema: `name(arguments) -> results`.
        reference: computes the results.
        shapes: allocates results of the right shapes and dtypes; it runs on fake tensors.
    """
    name = LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    REFERENCES[name] = reference
    # The same schema in the namespace of unchecked kernels; see device_check.py.
    for waiting in _WAITING:
        waiting.define(schema)

    def first(*arguments: Any) -> Any:
        """Runs until the library is loaded, and afterwards where it has no such operator."""
        device = next(value.device for value in _flat(arguments) if isinstance(value, Tensor))
        if device_check.in_place(name, device, reference):
            return getattr(torch.ops.shardcomp, name).default(*arguments)
        return reference(*arguments)

    # One implementation for all devices, below autograd: the gradient is that of `differentiate`, never that of the reference.
    LIBRARY.impl(name, first, "CompositeExplicitAutograd")
    torch.library.register_fake(f"shardcomp::{name}", shapes, lib=LIBRARY)


def _flat(arguments: Sequence[Any]) -> Iterator[Any]:
    """The arguments, with the elements of lists in place of the lists."""
    for argument in arguments:
        yield from argument if isinstance(argument, list | tuple) else (argument,)


def differentiate(name: str, backward: Callable[..., Any], save: Callable[..., Any]) -> None:
    """Register the gradient of an operator. save(ctx, inputs, output) stores what `backward(ctx, *gradients)` needs."""
    torch.library.register_autograd(f"shardcomp::{name}", backward, setup_context=save, lib=LIBRARY)


def register(
    function: Callable[..., Any],
    family: str = "other",
    facts: str = "",
    *,
    rule: str | Callable[[fx.Node], Factoring | None] | None = None,
    forms: Mapping[str, Form] | None = None,
    splits: Any = None,
    cases: small_cases.Cases | None = None,
    **columns: Any,
) -> None:
    """Tell the compiler everything about a function.

    Args:
        function: what a program calls. Its name is public, and emitted code uses it.
        family: a key of `operators.FAMILIES`.
        facts: keys of `operators.FACTS`.
        rule: how the function may be sharded: a line of the notation in `sharding.notation`, or a function of a call. None:
            not at all, or it is a split form itself.
        forms: for a line, factor -> the split form where that factor is split.
        splits: the operator of torch that `function` is the split form of; `rule` is then that operator's.
        cases: makes a small call of each operator of the kernel, with which compiled kernels are compared.
        columns: further fields of `operators.Operator`, such as `kernel`, the name that reports and policies count it under.
    """
    FUNCTIONS[function.__name__] = function
    operators.add(function, family, facts, **columns)
    if rule is not None:
        registered = Rule(line=parse(rule), forms=forms or {}) if isinstance(rule, str) else Rule(function=rule)
        RULES[function if splits is None else splits] = registered
    if cases is not None:
        small_cases.add(function.__name__.rstrip("_"), family, cases)


def widened(x: Tensor) -> Tensor:
    """`x` in the dtype of computation: float32, or float64 for float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def summed_rows(x: Tensor) -> Tensor:
    """The sum over all dimensions but the last."""
    return (x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)).sum(0)


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` with the strides of `torch.empty_like(like)`, which the shapes of fake tensors promise."""
    result = torch.empty_like(like)
    return tensor if tensor.stride() == result.stride() else result.copy_(tensor)
