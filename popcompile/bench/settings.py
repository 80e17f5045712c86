"""What a benchmark is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from popcompile.arguments import POSITIVE, SEED
from popcompile.bench.images import Size
from popcompile.bench.subjects import Subject
from popcompile.errors import PopcompileError


@dataclass(frozen=True)
class BenchSettings:
    """As the arguments of `bench`, in the order of the report; threads: a number, also where the user gave none.
    images: rows and columns of each, in tokens.
    """

    lengths: list[int]
    batch: int
    decode_tokens: int
    repeats: int
    threads: int
    provider: str
    runtime: str
    seed: int
    images: list[Size]

    @property
    def image_tokens(self) -> int:
        """Of a prompt, beside those of its text."""
        return sum(rows * columns for rows, columns in self.images)

    @classmethod
    def of(cls, *, lengths: Sequence[int], threads: int | None, **others: Any) -> BenchSettings:
        """Raises PopcompileError where a number is none of its kind."""
        cores = _cores()
        settings = cls(lengths=list(lengths), threads=_threads(cores) if threads is None else threads, **others)
        if not settings.lengths or len(set(settings.lengths)) < len(settings.lengths):
            listed = ",".join(map(str, settings.lengths))
            raise PopcompileError(f"--lengths {listed}: give each length once, and at least one")
        for length in settings.lengths:
            POSITIVE.require("--lengths", length)
        POSITIVE.require("--batch", settings.batch)
        POSITIVE.require("--decode-tokens", settings.decode_tokens)
        POSITIVE.require("--repeats", settings.repeats)
        SEED.require("--seed", settings.seed)
        if not 1 <= settings.threads <= cores:
            raise PopcompileError(f"--threads {threads}: this machine has {cores}; give 1 to {cores}")
        return settings

    def require_room(self, subject: Subject) -> None:
        """Raises PopcompileError where the prompts are longer than the subject's context."""
        limit, longest, seen = subject.context_length, max(self.lengths), self.image_tokens
        if limit is not None and longest + seen + self.decode_tokens > limit:
            images = f", images of {seen} tokens" if seen else ""
            raise PopcompileError(
                f"--lengths {longest}{images} and --decode-tokens {self.decode_tokens} are more than the context of"
                f" {limit} of {subject.path}; lower one of them"
            )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(psutil.Process, "cpu_affinity"):
        return len(psutil.Process().cpu_affinity())
    return psutil.cpu_count() or 1


def _threads(cores: int) -> int:
    return max(1, min(cores, psutil.cpu_count(logical=False) or cores))
