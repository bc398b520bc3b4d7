"""Progress bars on a terminal or in a notebook; plain lines in a file, or in a notebook without ipywidgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress


def new_console() -> Console:
    """Standard error, or the output of a notebook's cell. Rich draws bars in a notebook with ipywidgets only."""
    console = Console(stderr=True)
    if console.is_jupyter and find_spec("ipywidgets") is None:
        return Console(stderr=True, force_jupyter=False, force_terminal=False)
    return console


class Progress:
    """Stages of one run on standard error."""

    def __init__(self, *, enabled: bool, console: Console | None = None) -> None:
        self._console = console or new_console()
        self._enabled = enabled
        self._bars = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not enabled or not self._animated,
        )

    @property
    def _animated(self) -> bool:
        return self._console.is_terminal or self._console.is_jupyter

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """A stage of unknown length."""
        self._say(what)
        task = self._bars.add_task(what, total=None)
        yield
        self._bars.remove_task(task)

    @contextmanager
    def counting(self, what: str, *, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """A stage of `total` steps. Call the yielded function with the number of steps since the last call."""
        self._say(f"{what} {total} {unit}")
        task = self._bars.add_task(f"{what} {unit}", total=total)
        yield lambda steps: self._bars.advance(task, steps)

    def _say(self, line: str) -> None:
        if self._enabled and not self._animated:
            self._console.print(line, highlight=False, markup=False)
