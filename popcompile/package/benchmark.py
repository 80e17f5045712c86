"""What a benchmark's JSON holds: `bench` returns it, --json prints it, and with --save a package's report keeps it."""

from __future__ import annotations

from typing import Any, Literal, NotRequired, TypedDict

#: what is timed: the tower's call, of prompts with images; the call of the prefill graph; that, the making of a cache,
#: the picking of the token and the tower; greedy steps after it
Measure = Literal["vision", "prefill", "time_to_first_token", "decode"]


class Timing(TypedDict):
    """seconds: of every turn. median, half_spread: of these. tokens_per_second: of all rows, by the median."""

    seconds: list[float]
    median: float
    half_spread: float
    tokens_per_second: float


class PromptTimes(TypedDict):
    """Of prompts with `tokens` tokens of text. first_token: of every row. continuation: [batch, 1 + decode tokens]."""

    tokens: int
    first_token: list[int]
    continuation: list[list[int]]
    vision: NotRequired[Timing]
    prefill: Timing
    time_to_first_token: Timing
    decode: Timing


class Memory(TypedDict):
    """Bytes that a process holds at most: anonymous ones, and resident ones. gpu: what it took of a GPU's memory.

    None: not known.
    """

    anonymous: int | None
    peak: int | None
    gpu: NotRequired[int | None]


class SubjectResult(TypedDict):
    """kind: of bench/subjects.py. path: None of what was compiled for the purpose. runtime: what a subject with a
    runtime of its own says of it.
    """

    name: str
    kind: str
    path: str | None
    runtime: NotRequired[str | None]
    load_seconds: float
    memory: Memory
    lengths: list[PromptTimes]


class Ratio(TypedDict):
    """The medians of the subject `over` by those of pop."""

    tokens: int
    over: str
    vision: NotRequired[float]
    prefill: float
    time_to_first_token: float
    decode: float


class Benchmark(TypedDict):
    """settings: those of bench/settings.py; of them "images" has rows and columns in tokens. versions: None of what is
    not installed. gpu: its name, with the provider cuda. subjects: the package, its full model, and the others.
    seconds: that all of it took.
    """

    package: str
    pruned: list[int]
    num_layers: int
    dtype: str
    source: str
    settings: dict[str, Any]
    versions: dict[str, str | None]
    cpu: str
    gpu: str | None
    subjects: list[SubjectResult]
    ratios: list[Ratio]
    warnings: list[str]
    seconds: float
