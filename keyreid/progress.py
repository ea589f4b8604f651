"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere (logs, SLURM)."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

Item = TypeVar("Item")
PLAIN_LINE_SECONDS = 10.0


class _Rate(ProgressColumn):
    """Items a second so far, empty before the first."""

    def render(self, task) -> Text:
        return Text(f"{task.speed:.1f} {task.fields['unit']}/s" if task.speed else "")


def track(
    items: Iterable[Item], total: int | None, description: str, unit: str = "items", quiet: bool = False
) -> Iterator[Item]:
    """Pass items through and show how many of `total` are done, the rate and the time left, on standard error."""
    if quiet:  # ranks other than the first
        yield from items
    elif sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(description, total=total, unit=unit)
            yield from progress.track(items, total=total, task_id=task)
    else:
        yield from _plain_lines(items, total, description, unit)


def _plain_lines(items: Iterable[Item], total: int | None, description: str, unit: str) -> Iterator[Item]:
    start = last = time.monotonic()
    done = 0
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last >= PLAIN_LINE_SECONDS:
            last = now
            rate = done / (now - start)
            left = f", {(total - done) / rate:.0f} s left" if total else ""
            print(f"{description}: {done}/{total or '?'} {unit}, {rate:.1f}/s{left}", file=sys.stderr, flush=True)
    elapsed = time.monotonic() - start
    if elapsed >= PLAIN_LINE_SECONDS:
        print(f"{description}: {done} {unit} in {elapsed:.0f} s", file=sys.stderr, flush=True)
