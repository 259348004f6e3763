"""Tables as Markdown writes them."""

from collections.abc import Iterable, Sequence


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells, without a line break at its end."""
    lines = [headings, *rows]
    head, *body = (f"| {' | '.join(cells)} |" for cells in lines)
    return "\n".join([head, "|---" * len(headings) + "|", *body])
