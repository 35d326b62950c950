"""Live progress: a bar per stage and identity in a terminal, plain lines elsewhere (`ray job logs`, CI)."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

LINE_EVERY_S = 10.0


class Display:
    """Shows which stage is at how many of how many, for which identity, and the time left."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._live = self.console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description:<34}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=self.console,
            disable=not self._live,
        )
        self._bars: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, text: str, style: str = "") -> None:
        """One line above the bars, as it is: names and reasons may come from anybody, so no markup is read in them."""
        self.console.print(Text(text, style=style), soft_wrap=True)

    def show(self, name: str, done: int, total: int, note: str = "") -> None:
        """Set the bar `name` to `done` of `total`; it is made when it is first shown."""
        if name not in self._bars:
            self._bars[name] = self._progress.add_task(name, total=total, note=note)
        self._progress.update(self._bars[name], completed=done, total=total, note=note)
        if not self._live:
            self._line(name, done, total, note)

    def _line(self, name: str, done: int, total: int, note: str) -> None:
        now, last = time.monotonic(), self._said.get(name)
        if last is not None and (last == float("inf") or (done < total and now - last < LINE_EVERY_S)):
            return
        self._said[name] = float("inf") if done >= total else now
        left = self._progress.tasks[list(self._bars).index(name)].time_remaining
        tail = f", about {left:.0f} s left" if left and done < total else ""
        self.say(f"{name}: {done} of {total}{tail}{'  ' + note if note else ''}")
