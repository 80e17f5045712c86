"""The tiny vision-language models that are really trained: once, and kept in the cache folder that tests share."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import train_tiny_vlm
from filelock import FileLock
from tiny_vlm.families import FAMILIES, Family
from train_tiny_vlm import make

from popcompile.frontend.samples import cache_folder


@dataclass(frozen=True)
class Trained:
    """family: what it is. made: the folder that train_tiny_vlm.py wrote, with its model, pictures and questions."""

    family: Family
    made: Path

    @property
    def model(self) -> Path:
        return self.made / "model"

    @property
    def questions(self) -> Path:
        return self.made / "questions" / "questions.jsonl"


@pytest.fixture(scope="session", params=list(FAMILIES))
def trained(request: pytest.FixtureRequest) -> Trained:
    """Some ten minutes of CPU time, where no run before has trained it by the same code."""
    name: str = request.param
    folder = cache_folder() / f"tiny-{name}-{_digest()}"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary, _one_thread():
                make(FAMILIES[name], Path(temporary) / "made")
                (Path(temporary) / "made").rename(folder)
    return Trained(FAMILIES[name], folder)


def _digest() -> str:
    """Of the code that trains."""
    script = Path(train_tiny_vlm.__file__)
    files = [script, *sorted((script.parent / "tiny_vlm").glob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """As the script trains, so that the result is the script's: sums of floats depend on how threads share them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
