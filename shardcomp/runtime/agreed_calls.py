"""The code of each call, once the ranks agree that they make the same one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardcomp.errors import PlanError
from shardcomp.ir.collectives import Axis
from shardcomp.runtime.agreement import Agreed, Agreement
from shardcomp.runtime.blueprint import Blueprint
from shardcomp.runtime.call_cache import CallCache, LoadedCall
from shardcomp.runtime.micro_batches import filled_up, one_sample, split, uncounted
from shardcomp.runtime.trained import TrainedParameters

EXCHANGED = ("tp", "pp", "dp")
"""The axes that a call is compared along, in this order. dp comes last: its exchange also carries what the others saw."""


class AgreedCalls:
    """Looks up the code of a call, and exchanges what all ranks need to know before they run it.

    training, mode: the model's, see `Origin`.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        calls: CallCache,
        agreement: Agreement,
        axes: Mapping[str, Axis],
        device: torch.device,
        named: Sequence[tuple[str, Any]],
        mode: bool | None,
        training: bool,
    ) -> None:
        self._blueprint, self._calls, self._agreement, self._axes, self._device = blueprint, calls, agreement, axes, device
        self.trained = TrainedParameters(named, blueprint)
        self.mode, self.training = mode, training

    def agree(
        self,
        call: str,
        micro_batches: list[dict[str, Tensor]],
        outputs: tuple[str, ...],
        axes: Sequence[str],
        counts: bool,
        batch: Mapping[str, Tensor] | None = None,
    ) -> tuple[LoadedCall, Agreed]:
        """The code of a call, and what the ranks along `axes` agreed on.

        counts: whether to count the labels. batch: all samples, where there are several micro-batches of them.
        """
        code = self._calls.of(micro_batches[0], outputs, self.mode)
        batch = micro_batches[0] if batch is None else batch
        bounds = {name: bound for name, bound in code.blueprint.index_bounds.items() if name in batch}
        floating = [name for name in bounds if batch[name].is_floating_point()]
        if floating:
            raise PlanError(f"{call}: {', '.join(floating)} is {batch[floating[0]].dtype}: tokens and labels are integers")
        tokens = torch.zeros((), dtype=torch.int64, device=self._device)
        if counts:
            with torch.no_grad():
                counted = [
                    code.stages[0].tokens(**{name: micro_batch[name] for name in code.blueprint.token_inputs})
                    for micro_batch in micro_batches
                ]
                tokens = torch.stack(counted).sum()
        digest, changed = self.trained.look()
        mode = f"{call} -> ({', '.join(outputs)}), {'training' if self.training else 'evaluating'},"
        agreed = self._agreement.exchange(mode, batch, bounds, axes, tokens, len(micro_batches), digest, changed)
        if agreed.changed:  # some rank trains a parameter that the code has no gradient sums for: lower it again
            self._calls.trained = self.trained.grow((self._axes[name] for name in axes), self._device)
            code = self._calls.of(micro_batches[0], outputs, self.mode)
        return code, agreed

    def micro_batches(
        self, call: str, batch: dict[str, Tensor], outputs: tuple[str, ...]
    ) -> tuple[LoadedCall, Agreed, list[dict[str, Tensor]]]:
        """A step's code, what the ranks agreed on, and its micro-batches.

        From zero = 2 on the ranks of dp exchange parameters and gradients in every micro-batch. A rank with fewer of them than
        another computes some extra ones whose labels do not count.
        """
        if "labels" not in batch:
            raise PlanError(f"{call}: no labels; give labels=, with -100 where a token does not count")
        rows = next(iter(batch.values())).shape[0]
        size = max(1, min(self._blueprint.micro_batch or rows, rows))
        if not rows:
            batch = one_sample(batch, self._blueprint)
        code = self._calls.of({name: tensor[:size] for name, tensor in batch.items()}, outputs, self.mode)
        one_size = self._blueprint.mesh.pp > 1 or code.blueprint.static_shape is not None
        batch = filled_up(batch, rows, -(-rows // size) * size if one_size and rows else max(rows, 1), code.blueprint)
        micro_batches = split(batch, size)
        code, agreed = self.agree(call, micro_batches, outputs, EXCHANGED, counts=True, batch=batch)
        if self._blueprint.zero >= 2:
            micro_batches += [
                uncounted(micro_batches[0], 0, code.blueprint) for _ in range(agreed.micro_batches - len(micro_batches))
            ]
        return code, agreed, [{**micro_batch, "num_items_in_batch": agreed.tokens} for micro_batch in micro_batches]
