"""The model's names of tensors in a HuggingFace directory.

The hub's files may lack the base model's prefix. Earlier releases of transformers had other names for modules. They also saved
tensors that every release computes. transformers knows both.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable
from typing import Any

Rename = Callable[[str], str]

COMPUTED = ("inv_freq", "masked_bias", "position_ids")
"""Last parts of the names of tensors that earlier releases saved and every release computes."""


def resolve(stored: Iterable[str], known: Container[str], model: Any = None) -> dict[str, str]:
    """Each stored name -> the model's name, or the stored one where the model has none.

    known: the model's names. model: has the prefix of its base model and, if it is one of transformers', earlier names.
    """
    renames = _renames(model)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def spellings(name: str) -> Iterable[str]:
        renamed = name
        for rename in renames:
            renamed = rename(renamed)
        for spelling in (name, renamed):
            yield from (spelling, spelling.removeprefix(prefix), prefix + spelling)

    return {name: next((spelling for spelling in spellings(name) if spelling in known), name) for name in stored}


def is_computed(name: str, shape: tuple[int, ...], model: Any = None) -> bool:
    """Whether a stored tensor, which is not a weight of the model, is one that the model computes: one that its class ignores,
    a buffer, or a table of causal masks."""
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    buffers = {buffer for buffer, _ in model.named_buffers()} if hasattr(model, "named_buffers") else set()
    return (
        name in buffers
        or name.rpartition(".")[2] in COMPUTED
        or any(re.search(pattern, name) for pattern in ignored)
        or (len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3])
    )


def _renames(model: Any) -> list[Rename]:
    """The renames of transformers as it loads, in order. It also merges and splits tensors of some models, which is not done
    here."""
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # before transformers 5
        mapping = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        return [lambda name, old=old, new=new: re.sub(old, new, name) for old, new in mapping.items()]  # type: ignore[misc]
    if not isinstance(model, PreTrainedModel):
        return []
    renamings = [mapping for mapping in get_model_conversion_mapping(model) if isinstance(mapping, WeightRenaming)]
    return [lambda name, renaming=renaming: renaming.rename_source_key(name)[0] for renaming in renamings]  # type: ignore[misc]
