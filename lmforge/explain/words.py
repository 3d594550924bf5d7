"""Figures as a person reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

GIB = 2**30
SCALES = ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def gib(count: float | None) -> str:
    """Bytes as GiB or MiB (2^30, 2^20)."""
    if count is None:
        return "not estimated"
    return f"{count / GIB:.1f} GiB" if abs(count) >= GIB / 10 else f"{count / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Seconds, minutes, hours or days, whichever reads best."""
    size = abs(seconds)
    for least, length, unit in ((2 * 86400, 86400, "days"), (2 * 3600, 3600, "h"), (120, 60, "min"), (1, 1, "s"), (1e-3, 1e-3, "ms")):
        if size >= least:
            return f"{seconds / length:,.0f} {unit}" if size >= 1000 * length else f"{seconds / length:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us" if seconds else "0 s"


def plain(number: float) -> str:
    """A number of three or more digits, its thousands apart while it has few."""
    if number == int(number) and abs(number) < 1e6:
        return f"{int(number):,}"
    return f"{number:,.0f}" if 1e3 <= abs(number) < 1e6 else f"{number:.4g}"


def count(number: float) -> str:
    """A whole number, in full while it is below a billion."""
    return f"{number:,.0f}" if abs(number) < 1e9 else short(number)


def short(number: float) -> str:
    """12,345,678 as 12.3M."""
    for size, letter in SCALES:
        if abs(number) >= size:
            return f"{number / size:.4g}{letter}"
    return f"{number:.4g}"


def columns(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of a table: the first column to the left, figures to the right."""
    widths = [max(len(row[index]) for row in (head, *rows)) for index in range(len(head))]
    for row in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()
