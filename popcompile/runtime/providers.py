"""Find an execution provider that works on this machine."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
from pathlib import Path

import onnxruntime as ort

from popcompile.errors import PopcompileError
from popcompile.export.providers import PROVIDERS, Provider
from popcompile.loading import one_line
from popcompile.runtime.gpu import has_gpu


def find_provider(name: str) -> Provider:
    """The provider called `name`. Raises PopcompileError where there is none, or where it cannot run here."""
    if name not in PROVIDERS:
        raise PopcompileError(f"provider {name}: unknown; choose one of {', '.join(PROVIDERS)}")
    provider = PROVIDERS[name]
    if provider.name not in ort.get_available_providers():
        raise PopcompileError(
            f"provider {name}: this onnxruntime {ort.__version__} has no {provider.name};"
            f' pip uninstall onnxruntime, then pip install {provider.package}, or use provider="cpu"'
        )
    if provider.gpu and not has_gpu():
        raise PopcompileError(
            f'provider {name}: no NVIDIA GPU with a working driver was found; install the driver, or use provider="cpu"'
        )
    try:
        _load_libraries(provider)
    except OSError as error:
        raise PopcompileError(unusable(provider, one_line(error))) from error
    return provider


def unusable(provider: Provider, reason: str) -> str:
    """The message for a provider of a GPU that ONNX Runtime has, and that does not work here."""
    return (
        f"provider {provider.device}: onnxruntime {ort.__version__} cannot use it ({reason}); pip install"
        ' "onnxruntime-gpu[cuda,cudnn]" for the libraries of CUDA, or use provider="cpu"'
    )


def _load_libraries(provider: Provider) -> None:
    """Load what ONNX Runtime's provider needs, from pip packages where there are some.

    Raises OSError naming the missing library; ONNX Runtime itself would log it and go on without the provider.
    """
    if not provider.libraries:
        return
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()
    pattern = "onnxruntime_providers_{}.dll" if os.name == "nt" else "libonnxruntime_providers_{}.so"
    for part in provider.libraries:
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / pattern.format(part)), mode=ctypes.RTLD_GLOBAL)
