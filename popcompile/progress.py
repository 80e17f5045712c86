"""A progress bar on stderr for long steps, on a terminal only."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from tqdm import tqdm

#: share of a conversion's time that has passed when a step begins and ends, in percent
_STEPS = {
    "trace": (0, 25),
    "compile": (25, 40),
    "export": (40, 85),
    "weights": (85, 98),
    "flush": (98, 100),
    "done": (100, 100),
}
#: the same of an analysis
ANALYZE_STEPS = {"trace": (0, 10), "sample": (10, 50), "analyze": (50, 100)}


@contextmanager
def progress_bar(steps: Mapping[str, tuple[int, int]] = _STEPS) -> Iterator[Callable[[str, int, int], None]]:
    """Yields the `progress` argument of `convert`, or of what has other `steps`."""
    bar_format = "{desc:10}{bar}{percentage:4.0f}%"
    with tqdm(total=100, disable=not sys.stderr.isatty(), bar_format=bar_format, leave=False) as bar:

        def progress(step: str, done: int, total: int) -> None:
            start, end = steps[step]
            bar.set_description_str(step)
            bar.n = start + (end - start) * done // max(total, 1)
            bar.refresh()

        yield progress
