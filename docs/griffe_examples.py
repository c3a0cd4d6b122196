"""Adapts docstrings to the parser of the site, which reads Google's style more strictly than this repository writes it.

- `Example:` becomes `Examples:`. The parser knows no other section of code.
- In `Args:`, a line such as `rows, length: the shape` becomes a line for each name. The parser takes `rows, length` for one
  name, and finds neither its type nor its default.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

_ARGS = re.compile(r"^( *)Args:\n(?:\1 +\S.*(?:\n|\Z))+", re.MULTILINE)
_GROUP = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)


def adapt(docstring: str) -> str:
    """A docstring as the parser wants it.

    Example:
        >>> print(adapt("Args:\\n    a, b: two sizes,\\n        in bytes.\\n\\nExample:\\n    a, b: c"))
        Args:
            a: two sizes,
                in bytes.
            b: two sizes,
                in bytes.
        <BLANKLINE>
        Examples:
            a, b: c
    """
    docstring = re.sub(r"^( *)Example:$", r"\1Examples:", docstring, flags=re.MULTILINE)
    return _ARGS.sub(lambda section: _GROUP.sub(_one_line_each, section[0]), docstring)


def _one_line_each(group: re.Match[str]) -> str:
    indent, names, text = group.groups()
    return "\n".join(f"{indent}{name}: {text}" for name in names.split(", "))


class Examples(griffe.Extension):
    """Adapts every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = adapt(obj.docstring.value)
