"""What the long steps of a plan made, kept in a folder, so that a conversion that was stopped goes on from there.

    text            tokens that were sampled
    input_factors   of linear layers whose activations are rounded
    maps            of a set of layers, of all the text, in closed form or refined
    losses          of a set of layers, on what was held out

Hidden states are not kept: they are many gigabytes, and made again in less time than what comes before and after them.
A result is a file of its own, which appears whole or not at all. All of a folder belong to one key: what was asked for,
of what, by which version.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from popcompile.errors import PopcompileError
from popcompile.package.measurements import read_loss
from popcompile.package.report import Loss

_KEY = "steps.json"
_ENDINGS = ".safetensors", ".json", ".partial"


class Steps:
    """Keeps nothing: every result is computed."""

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `compute` returns, or returned before under this name."""
        return compute()

    def loss(self, name: str, compute: Callable[[], Loss]) -> Loss:
        """The same of a loss."""
        return compute()

    def remove(self) -> None:
        """Forget all results."""


#: of a conversion that keeps nothing
COMPUTED = Steps()


class KeptSteps(Steps):
    """Results in files of a folder, which appears with the first one."""

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        """key: JSON that says whose results they are. Raises PopcompileError where the folder has another one."""
        self._folder, self._key = folder, json.loads(json.dumps(key))
        if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
            return
        try:
            found = json.loads((folder / _KEY).read_bytes())
            changed = sorted(name for name in found.keys() | self._key if found.get(name) != self._key.get(name))
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise PopcompileError(
                f"--resume: {folder} holds no steps of a conversion; move it away, or leave --resume out"
            ) from error
        if changed:
            raise PopcompileError(
                f"--resume: {folder} is of a conversion with another {', '.join(changed)}; remove it to begin again, or"
                " ask for the same"
            )

    def tensors(self, name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        path = self._folder / f"{name}.safetensors"
        with contextlib.suppress(OSError, SafetensorError):  # not there, or damaged
            return load_file(path)
        made = compute()
        self._write(path, lambda partial: save_file(made, partial))
        return made

    def loss(self, name: str, compute: Callable[[], Loss]) -> Loss:
        path = self._folder / f"{name}.json"
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return read_loss(json.loads(path.read_bytes()))
        made = compute()
        self._write(path, lambda partial: partial.write_text(json.dumps(asdict(made)), encoding="utf-8"))
        return made

    def _write(self, path: Path, write: Callable[[Path], Any]) -> None:
        self._folder.mkdir(exist_ok=True)
        key = self._folder / _KEY
        if path != key and not key.exists():
            self._write(key, lambda partial: partial.write_text(json.dumps(self._key, indent=1), encoding="utf-8"))
        partial = path.with_suffix(f".{os.getpid()}.partial")
        write(partial)
        os.replace(partial, path)

    def remove(self) -> None:
        """The folder goes too, unless something else is in it."""
        with contextlib.suppress(OSError):
            for file in self._folder.iterdir():
                if file.suffix in _ENDINGS:
                    file.unlink()
            self._folder.rmdir()
