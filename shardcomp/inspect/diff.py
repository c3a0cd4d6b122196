"""What a pass changed: the listings before and after it, compared."""

from __future__ import annotations

import difflib


def diff(before: str, after: str, before_name: str, after_name: str) -> str:
    """A unified diff of two listings; empty where they are equal. The names head it and may say which passes came last."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), before_name, after_name, lineterm="")
    return "".join(f"{line}\n" for line in lines)
