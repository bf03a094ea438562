"""How far a command is: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")


def progress_bar(console: Console) -> Progress:
    """A bar with the tasks that are done, the one under way, and the time gone and left."""
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


@contextmanager
def each(console: Console, items: Sequence[Item]) -> Iterator[Iterator[Item]]:
    """Yields the items. The one under way is shown beside a bar, or in a line "3/12: item"."""

    def in_lines() -> Iterator[Item]:
        for number, item in enumerate(items, start=1):
            console.print(f"{number}/{len(items)}: {item}", highlight=False, markup=False)
            yield item

    if not console.is_terminal:
        yield in_lines()
        return
    with progress_bar(console) as bar:
        task = bar.add_task("...", total=len(items))

        def beside_a_bar() -> Iterator[Item]:
            for number, item in enumerate(items):
                bar.update(task, completed=number, description=str(item))
                yield item
            bar.update(task, completed=len(items))

        yield beside_a_bar()
