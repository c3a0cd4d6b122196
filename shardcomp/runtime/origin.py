"""What a sharded model takes over from the dense model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from shardcomp.errors import CheckpointError
from shardcomp.runtime.hooks import DenseHooks, hooks_of


@dataclass(frozen=True)
class Origin:
    """What cannot be read from a program.

    config, generation_config: HuggingFace's, None where there is none. kind: the class of the model, or of the HuggingFace
    model inside of it. training: its mode. mode: the same, or None where its modules are in different modes. hooks: those on
    its parameters, by name.
    """

    config: Any = None
    generation_config: Any = None
    kind: type | None = None
    training: bool = True
    mode: bool | None = True
    hooks: Mapping[str, DenseHooks] = field(default_factory=dict)

    @staticmethod
    def of(model: nn.Module) -> Origin:
        """What to take over from a dense model."""
        from transformers import PreTrainedModel  # saved source runs without it

        kinds = (type(module) for module in model.modules() if isinstance(module, PreTrainedModel))
        return Origin(
            getattr(model, "config", None),
            getattr(model, "generation_config", None),
            next(kinds, None),
            model.training,
            mode_of(model),
            hooks_of(model),
        )

    def check_names(self, names: Collection[str], aliases: Collection[str]) -> None:
        """Raise CheckpointError where files with these tensors are not what `from_pretrained` of the model's class reads: it
        would start from random weights in their place."""
        kind = self.kind
        if kind is None:
            return
        expected = _state_names(kind, self.config)
        if expected is None:
            warnings.warn(
                f"{kind.__name__} cannot be built from its configuration alone: whether from_pretrained reads the names that "
                "are saved was not checked",
                stacklevel=3,
            )
            return
        lacking = sorted(name for name in expected if name not in names and name not in aliases)
        if lacking:
            strange = [name for name in names if name not in expected]
            effects = "; ".join(text for text in (_shown(lacking, "be random"), _shown(strange, "not be used")) if text)
            raise CheckpointError(
                f"{kind.__name__}.from_pretrained would not read what this model has: {effects}. Adapters and parametrizations "
                "are to be merged in the dense model first; save_pretrained(path, strict=False) writes these tensors as they "
                "are, for shard(model, policy, checkpoint=path)"
            )


def mode_of(model: nn.Module) -> bool | None:
    """Whether a model is in training mode; None where some of its modules are and others are not."""
    modes = {module.training for module in model.modules()}
    return modes.pop() if len(modes) == 1 else None


def _state_names(kind: type, config: Any) -> set[str] | None:
    """The names of a fresh model's state; None where its class cannot be built from the configuration alone."""
    try:
        with torch.device("meta"):
            return set(kind(copy.deepcopy(config)).state_dict())
    except Exception:
        return None


def _shown(names: list[str], what: str) -> str:
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{', '.join(names[:2])}{more} would {what}" if names else ""
