"""What the names in a HuggingFace directory mean. The hub's files may lack the base model's prefix, and earlier releases named
modules otherwise and saved tensors that every release computes; transformers knows of both, and is asked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable
from typing import Any

Rename = Callable[[str], str]

COMPUTED = ("inv_freq", "masked_bias", "position_ids")
"""Last parts of the names of tensors that earlier releases saved and every release computes."""


def resolve(stored: Iterable[str], known: Container[str], model: Any = None) -> dict[str, str]:
    """Each stored name -> the model's name for it, or itself where the model has none.

    known: the model's names. model: says the prefix of its base model and, where it is transformers' own, earlier names.
    """
    renames = _renames(model)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def spellings(name: str) -> Iterable[str]:
        now = name
        for rename in renames:
            now = rename(now)
        for each in (name, now):
            yield from (each, each.removeprefix(prefix), prefix + each)

    return {name: next((each for each in spellings(name) if each in known), name) for name in stored}


def is_computed(name: str, shape: tuple[int, ...], model: Any = None) -> bool:
    """Whether a stored tensor that is none of the model's weights is something that the model computes: one that its class says
    to ignore, a buffer of its own, or a table of which token sees which."""
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    buffers = {each for each, _ in model.named_buffers()} if hasattr(model, "named_buffers") else set()
    return (
        name in buffers
        or name.rpartition(".")[2] in COMPUTED
        or any(re.search(pattern, name) for pattern in ignored)
        or (len(shape) == 4 and shape[:2] == (1, 1) and shape[2] == shape[3])
    )


def _renames(model: Any) -> list[Rename]:
    """What transformers renames as it loads, in order. It also merges and splits tensors of some models: not done here."""
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # before transformers 5
        mapping = getattr(model, "_checkpoint_conversion_mapping", None) or {}
        return [lambda name, old=old, new=new: re.sub(old, new, name) for old, new in mapping.items()]  # type: ignore[misc]
    if not isinstance(model, PreTrainedModel):
        return []
    found = [each for each in get_model_conversion_mapping(model) if isinstance(each, WeightRenaming)]
    return [lambda name, each=each: each.rename_source_key(name)[0] for each in found]  # type: ignore[misc]
