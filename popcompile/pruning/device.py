"""The device on which PyTorch runs a model, to sample text, to calibrate and to measure: `--device`.

on the device   parameters, and what is computed with them: batches of hidden states, logits, maps
on the CPU      tokens, random numbers, hidden states in their files, and what passes and export are given
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from popcompile.arguments import shortened
from popcompile.errors import PopcompileError
from popcompile.loading import one_line

CPU = torch.device("cpu")


def find_device(name: str) -> torch.device:
    """The device of that name: "cpu", "cuda", or "cuda:N".

    Raises PopcompileError where the name is another, and where PyTorch finds no such GPU.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise PopcompileError(f"--device {shortened(name)}: unknown; give cpu, cuda, or cuda:N for another GPU")
    if device.type == "cpu":
        return CPU
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        cause = "finds no GPU with a working driver; install one" if built else "has no CUDA; install a build that has"
        raise PopcompileError(
            f"--device {name}: no CUDA device: torch {torch.__version__} {cause}, or give --device cpu"
        )
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise PopcompileError(f"--device {name}: not there; give one from cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)


@contextlib.contextmanager
def memory_explained(device: torch.device) -> Iterator[None]:
    """Raise PopcompileError where the device runs out of memory."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PopcompileError(
            f"--device {device}: its memory does not suffice ({one_line(error)}); free some, or give --device cpu"
        ) from error
