"""Where the commands print: consoles, bars and status lines that keep quiet where there is no terminal."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich import progress as bars
from rich.console import Console

DEBUG = "BITINFER_DEBUG"
PIPE_WIDTH = 120  # of tables that go to a file or a pipe


def debugging() -> bool:
    """Whether tracebacks and the remarks of other libraries are wanted."""
    return os.environ.get(DEBUG, "0") not in ("", "0")


def console(stderr: bool = False) -> Console:
    """Return a console on stdout or stderr: plain text, and wide enough for the tables, where that is no terminal."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=False)


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """Yield a function that says on stderr what is happening; silent where that is no terminal."""
    out = console(stderr=True)
    quiet_transformers()
    if not out.is_terminal:
        yield lambda text: None
        return
    with out.status("") as spinner:
        yield lambda text: spinner.update(text)


@contextmanager
def progress_bar(label: str, in_bytes: bool = False) -> Iterator[Callable[[int, int, str], None]]:
    """Yield a function (done, total, what) that moves a bar on stderr; silent where that is no terminal."""
    out = console(stderr=True)
    amount = bars.DownloadColumn() if in_bytes else bars.MofNCompleteColumn()
    columns = (
        bars.TextColumn(label),
        bars.BarColumn(),
        amount,
        bars.TimeRemainingColumn(),
        bars.TextColumn("{task.description}"),
    )
    with bars.Progress(*columns, console=out, transient=True, disable=not out.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def quiet_transformers() -> None:
    """Keep transformers' bars and remarks out of the output; --debug shows them."""
    if not debugging():
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
