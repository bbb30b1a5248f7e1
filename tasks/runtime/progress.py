"""The progress bar of a stage, which also writes its figures to a file for `status`."""

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from tqdm import tqdm


class Bar(tqdm):
    """A progress bar that also writes its figures to `file`, for `status` and the scheduler.

    The class attributes belong to the process: it shows one bar at a time.
    """

    file: Path | None = None
    shown: ClassVar["Bar | None"] = None  # the bar that is shown now
    written_at = -1e9  # seconds of the monotonic clock
    shard = 0  # units a shard; 0: the recipe's shard_size
    now = ""  # the current activity, in a word
    terminal = False

    def say(self, word: str) -> None:
        """Show `word` beside the bar, and in the file, until the next one."""
        if word == self.now:
            return
        self.now = word
        Bar.written_at = -1e9  # write at once: the next update may be far off
        self._write_figures()
        if self.terminal:  # a log file shows it on its next line
            self.refresh()

    @property
    def format_dict(self) -> Any:
        figures = super().format_dict
        beside = [part for part in (self.now, figures.get("postfix")) if part]
        return figures | {"postfix": ", ".join(beside)}

    def close(self) -> None:
        self.now = ""
        if Bar.shown is self:
            Bar.shown = None
        super().close()

    def update(self, n: float | None = 1) -> bool | None:
        shown = super().update(n)
        self._write_figures()
        return shown

    def __iter__(self) -> Iterator[Any]:
        for item in super().__iter__():
            yield item
            self._write_figures(self.n + 1)

    def _write_figures(self, done: float | None = None) -> None:
        """Write the figures to the file, at most twice a second."""
        now = time.monotonic()
        if Bar.file is None or now - Bar.written_at < 0.5:
            return
        Bar.written_at = now
        figures = {
            "what": self.desc,
            "done": self.n if done is None else done,
            "total": self.total,
            "unit": str(self.unit).strip(),
            **({"shard": self.shard} if self.shard else {}),
            **({"now": self.now} if self.now else {}),
        }
        fresh = Bar.file.with_suffix(".tmp")
        with suppress(OSError):
            fresh.write_text(json.dumps(figures), encoding="utf-8")
            os.replace(fresh, Bar.file)


def progress(
    items: Iterable[Any] | None,
    *,
    desc: str,
    total: int | None,
    unit: str,
    done: int = 0,
    shard: int = 0,
) -> tqdm:
    """A progress bar: rate and time left on a terminal, a line every 15 s in a log file.

    `done` of `total` units were done before. `shard` is how many units a shard holds, for a stage
    without a setting `shard_size`.
    """
    terminal = sys.stderr.isatty() or bool(os.environ.get("DIVE_TERMINAL"))
    bar = Bar(
        items,
        desc=desc,
        total=total,
        initial=done,
        unit=f" {unit}",
        mininterval=0.2 if terminal else 15,
        dynamic_ncols=True,
        smoothing=0.1,
    )
    bar.shard, bar.terminal = shard, terminal
    Bar.shown = bar
    return bar


def doing(word: str) -> None:
    """Show `word` as the current activity beside this process's progress bar, if it shows one."""
    if Bar.shown is not None:
        Bar.shown.say(word)
