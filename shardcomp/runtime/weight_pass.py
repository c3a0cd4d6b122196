"""The second half of a split backward: the gradients of weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from shardcomp.runtime.unit import DetachNode
from shardcomp.torch_private import grad_node_of, run_backward


@functools.cache
def starts_at_freed_nodes() -> bool:
    """Whether a backward can start at a torch.autograd.Function whose results are freed. In torch 2.11 it cannot: then the
    whole graph of a micro-batch stays in memory between the two halves of its backward."""
    x = torch.zeros((), requires_grad=True)
    node = DetachNode.apply(x).grad_fn
    try:
        _backward([(GradientEdge(node, 0), x.detach())], [grad_node_of(x)])
    except RuntimeError:
        return False
    return True


def _backward(begin: list[tuple[GradientEdge, Tensor]], nodes: Sequence[Any]) -> tuple[Tensor, ...]:
    """The gradients that arrive at `nodes`. torch.autograd.grad of 2.11 cannot start at a torch.autograd.Function: it asks for
    the shape of its result."""
    edges, gradients = zip(*begin, strict=True)
    arrive = tuple(GradientEdge(node, 0) for node in nodes)
    return run_backward(edges, gradients, arrive)


def gradients_of_weights(weights: list[Tensor], groups: list[dict[str, Any]]) -> None:
    """The second half of a split backward, from the nodes that `stage_backward_input` recorded in `groups` to the weights.

    torch has it as `stage_backward_weight`. Before 2.13 that one sums the gradients of all results of a node, and takes the sum
    for the gradient of the first result.
    """
    weight_of = {grad_node_of(weight): weight for weight in weights}
    for group in groups:
        starts, ends = group.pop("intermediates"), list(group["params"])
        recorded = [(node, grads) for node, grads in zip(starts, group.pop("grads", []), strict=False) if grads is not None]
        edges = [(GradientEdge(node, i), grad) for node, grads in recorded for i, grad in enumerate(grads) if grad is not None]
        if not edges:
            continue
        # A start that another start leads to would get that one's gradient once more: each is fixed to its recorded one.
        handles = [node.register_prehook(lambda _, grads=grads: grads) for node, grads in recorded] if len(recorded) > 1 else []
        try:
            gradients = _backward(edges, ends)
        finally:
            for handle in handles:
                handle.remove()
        for node, gradient in zip(ends, gradients, strict=True):
            weight = weight_of[node]
            weight.grad = gradient if weight.grad is None else weight.grad + gradient
