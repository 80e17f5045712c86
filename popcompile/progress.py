"""How far a long command is, on stderr: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from popcompile.terminal import say

#: progress(step, done, total): done and total in the step's own unit
Progress = Callable[[str, int, int], Any]

#: what share of a command's time has passed when a step begins and ends, in percent
Steps = Mapping[str, tuple[int, int]]
CONVERT_STEPS: Steps = {
    "trace": (0, 2),
    "canonicalize": (2, 3),
    "sample": (3, 20),
    "balance": (20, 21),
    "calibrate": (21, 30),
    "choose": (30, 60),
    "refine": (60, 79),
    "measure": (79, 82),
    "compile": (82, 84),
    "lower": (84, 85),
    "export": (85, 95),
    "weights": (95, 99),
    "flush": (99, 100),
    "done": (100, 100),
}
ANALYZE_STEPS: Steps = {"trace": (0, 10), "sample": (10, 50), "analyze": (50, 100)}
EVALUATE_STEPS: Steps = {"variants": (0, 0), "evaluate": (0, 100)}
EVALUATE_CODE_STEPS: Steps = {"variants": (0, 0), "evaluate": (0, 30), "code": (30, 100)}
BENCH_STEPS: Steps = {"compile": (0, 5), "load": (5, 10), "measure": (10, 100)}


class StepTimes:
    """Counts the seconds of a command's steps while it hands their progress on.

    Those from one report to the next are of the step that was reported first.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress, self._step, self._since = progress, "", time.perf_counter()

    def __call__(self, step: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if self._step:
            self.seconds[self._step] = self.seconds.get(self._step, 0.0) + now - self._since
        self._step, self._since = step, now
        if self._progress:
            self._progress(step, done, total)


#: seconds between the lines that tell of progress where there is no terminal
LINES_EVERY = 120.0


@contextmanager
def progress_bar(steps: Steps) -> Iterator[Progress]:
    """Yields the `progress` argument of `convert`, `analyze`, `evaluate` and `bench`.

    On a terminal it is a bar on stderr, which is gone at the end; elsewhere, in a log, a line there every two minutes.
    It stays where it is while a step is done again, as the search does with layers and refinement with sets.
    """
    stderr, on_terminal = sys.stderr, sys.stderr is not None and sys.stderr.isatty()
    started = said = time.monotonic()
    bar_format = "{desc:13}{bar}{percentage:4.0f}% {elapsed}"
    with tqdm(total=100, disable=not on_terminal, file=stderr, bar_format=bar_format, leave=False) as bar:
        percent = 0

        def progress(step: str, done: int, total: int) -> None:
            nonlocal said, percent
            start, end = steps[step]
            percent = max(percent, start + (end - start) * done // max(total, 1))
            bar.set_description_str(step)
            bar.n = percent
            bar.refresh()
            now = time.monotonic()
            if not on_terminal and now - said >= LINES_EVERY:
                said = now
                say(f"popcompile: {step}, {percent}% after {tqdm.format_interval(now - started)}")

        yield progress
