"""Attention and masks through transformers' own extension points, registered for the time of a capture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from shardcomp.capture.masks import Mask, MaskToken, UnclearMask, classify, mask_of
from shardcomp.kernels.attention import RECORDED

NAME = "shardcomp"
"""The attention implementation that a twin's configuration names during a capture."""


class Recorder:
    """The attention function and the mask function of one capture, and what it saw of their use."""

    def __init__(self) -> None:
        self.tokens: list[MaskToken] = []
        self.arrived: set[int] = set()
        self.calls = 0
        self.violation: str | None = None
        self.dense_masks = 0
        self.padded = False

    def check(self, layers: int) -> str | None:
        """Why the attention of a model of that many layers is not what was recorded; None where it is."""
        if self.violation is not None:
            return self.violation
        if self.calls == 0:
            return "the model does not call transformers' attention interface"
        # A mask for a kind of layer that this model has none of arrives nowhere; then every layer has called us all the same.
        if self.calls < layers and any(id(token) not in self.arrived for token in self.tokens):
            return "the model asks for a mask that never reaches its attention"
        return None

    def _refuse(self, violation: str) -> UnclearMask:
        self.violation = self.violation or violation
        return UnclearMask(violation)

    def mask(self, batch_size: Any = None, kv_length: Any = None, **options: Any) -> MaskToken:
        """In place of a mask of [b, 1, q, k]: a token that says what it would be."""
        # With an offset, key 0 is no longer the first token of the row.
        for offset in (options.get("q_offset", 0), options.get("kv_offset", 0)):
            if isinstance(offset, int) and offset != 0:
                raise self._refuse("its mask has an offset, as with a cache")
        try:
            mask = classify(options["mask_function"], batch_size, kv_length, options.get("attention_mask"))
        except UnclearMask as unclear:
            raise self._refuse(str(unclear)) from None
        # Positions given once for all rows make one row of segments, and attention takes [b, s].
        if mask.segment is not None:
            mask = replace(mask, segment=mask.segment.expand(batch_size, -1))
        token = MaskToken(mask, lambda what: self._misused(what))
        self.tokens.append(token)
        return token

    def _misused(self, what: str) -> None:
        self.violation = self.violation or f"the model {what.replace(' it', ' its attention mask', 1)}"

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: MaskToken | Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Records the operator. query: [b, n, q, d], key: [b, m, k, d], value: [b, m, k, e]. Result: [b, q, n, e]."""
        self.calls += 1
        if options.get("head_mask") is not None:
            raise self._refuse("its attention takes a mask of heads")
        bias = options.get("position_bias")
        if isinstance(attention_mask, MaskToken):
            self.arrived.add(id(attention_mask))
            # The token arrived unread, so the mask means what its function says.
            mask = mask_of(attention_mask)
            self.padded = self.padded or mask.key_mask is not None
        elif isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
            # The model made its mask itself: a term of the scores, as wide as the keys.
            self.dense_masks += 1
            mask, bias = Mask(), _sum(bias, _additive(attention_mask[..., : key.shape[2]], query.dtype))
        else:
            raise self._refuse("the model calls its attention without the mask that it was given")
        out = RECORDED(
            query,
            key,
            value,
            q_segment=mask.segment,
            k_segment=mask.segment,
            key_mask=mask.key_mask,
            bias=bias,
            sinks=options.get("s_aux"),
            causal=mask.causal,
            window=mask.window,
            softcap=options.get("softcap"),
            scale=scaling,
            dropout=dropout,
        )
        # The interface wants [b, q, n, e], and no weights: a fused attention has none to give.
        return out.transpose(1, 2).contiguous(), None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of [b, 1, q, k] as a term of the scores."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))
    return mask


def _sum(bias: Tensor | None, term: Tensor) -> Tensor:
    return term if bias is None else bias + term


@contextmanager
def registered(recorder: Recorder) -> Iterator[None]:
    """Within, transformers knows `recorder`'s attention and mask under NAME; afterwards its registries are as they were."""
    AttentionInterface.register(NAME, recorder.attention)
    AttentionMaskInterface.register(NAME, recorder.mask)
    try:
        yield
    finally:
        AttentionInterface._global_mapping.pop(NAME, None)
        AttentionMaskInterface._global_mapping.pop(NAME, None)
