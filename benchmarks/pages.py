"""Pages of docs/ that are in part made from results: what stands between two marks is written anew, the rest stays."""

from __future__ import annotations

from pathlib import Path

from tastemaker.files import atomic_write


def put(page: Path, begin: str, end: str, made: str) -> None:
    """Put what was made between the marks of a page, which both have to be there."""
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{page} lacks the marks {begin} and {end}")
    with atomic_write(page) as file:
        file.write(f"{before}{begin}\n\n{made}\n{end}{after}")


def between(page: Path, begin: str, end: str) -> str:
    """What stands between the marks."""
    return page.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0].strip()
