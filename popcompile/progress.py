"""A progress bar on stderr for long steps, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

#: progress(step, done, total): done and total in the step's own unit
Progress = Callable[[str, int, int], Any]

#: what share of a command's time has passed when a step begins and ends, in percent
Steps = Mapping[str, tuple[int, int]]
CONVERT_STEPS: Steps = {
    "trace": (0, 2),
    "canonicalize": (2, 3),
    "sample": (3, 20),
    "calibrate": (20, 30),
    "choose": (30, 60),
    "refine": (60, 82),
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


@contextmanager
def progress_bar(steps: Steps) -> Iterator[Callable[[str, int, int], None]]:
    """Yields the `progress` argument of `convert`, `analyze`, `evaluate` and `bench`.

    The bar stays where it is while a step is done again, as the search does with layers and refinement with sets.
    """
    bar_format = "{desc:13}{bar}{percentage:4.0f}% {elapsed}"
    with tqdm(
        total=100, disable=sys.stderr is None or not sys.stderr.isatty(), bar_format=bar_format, leave=False
    ) as bar:

        def progress(step: str, done: int, total: int) -> None:
            start, end = steps[step]
            bar.set_description_str(step)
            bar.n = max(bar.n, start + (end - start) * done // max(total, 1))
            bar.refresh()

        yield progress
