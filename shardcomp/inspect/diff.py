"""What a pass changed: the listings before and after it, compared."""

from __future__ import annotations

import difflib


def diff(before: str, after: str, before_name: str, after_name: str) -> str:
    r"""A unified diff of two listings, empty if they are equal.

    Args:
        before, after: the listings.
        before_name, after_name: the headings, such as the passes that ran last.

    Example:
        >>> print(diff("a = 1\n", "a = 2\n", "zero", "emit"), end="")
        --- zero
        +++ emit
        @@ -1 +1 @@
        -a = 1
        +a = 2
    """
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), before_name, after_name, lineterm="")
    return "".join(f"{line}\n" for line in lines)
