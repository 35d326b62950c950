"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> str:
    """A table, ending with a new line.

    Args:
        left: columns of text, to the left; those after them are numbers, to the right.
    """
    lines = [heads, ["---"] * left + ["---:"] * (len(heads) - left), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
