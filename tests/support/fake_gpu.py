"""ONNX Runtime's CUDA provider without a GPU, for what happens on the host: which operators it takes, what the kernels
make of shapes and attributes, where memory goes. Numbers it cannot give: no kernel computes.

The provider's library is ONNX Runtime's own; the libraries of CUDA under it are made here, with gcc, from the names
that it asks for (fake_gpu.c).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import onnxruntime as ort

_PROVIDER = Path(ort.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"
_GENAI = _PROVIDER.parents[2] / "onnxruntime_genai" / "libonnxruntime-genai-cuda.so"
_USERS = [library for library in (_PROVIDER, _GENAI) if library.is_file()]
_RUNTIME = "libcudart.so.13"  # whose structures fake_gpu.c has
_DRIVER, _CUDNN = "libcuda.so.1", "libcudnn.so.9"  # of no version; opened by name
_ASKED_BY_POPCOMPILE = ("cuInit", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2")
_SOURCE = Path(__file__).with_name("fake_gpu.c")


def why_not() -> str | None:
    """Why there can be no fake GPU here: not for what ONNX Runtime asks of CUDA, that is for `build` to know."""
    if not _PROVIDER.is_file():
        return "the onnxruntime of this platform has no CUDA provider for Linux"
    if missing := [tool for tool in ("gcc", "nm") if not shutil.which(tool)]:
        return f"CUDA's libraries are compiled for these tests, and there is no {' and no '.join(missing)}"
    return None


def build(folder: Path) -> dict[str, str]:
    """Libraries in `folder`; returns the environment of a process that finds them."""
    assert _names().get(_RUNTIME), f"fake_gpu.c has the structures of {_RUNTIME}, this ONNX Runtime asks for another"
    compiled = folder / "fake_gpu.o"
    _gcc("-c", "-o", compiled, _SOURCE)
    defined = set(re.findall(r"^(?:\w+ )+\*?(\w+)\(", _SOURCE.read_text(), re.MULTILINE))
    for library, names in _names().items():
        rest = folder / f"{library}.c"
        rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names - defined)))
        options = [f"-Wl,-soname,{library}"]
        if library not in (_DRIVER, _CUDNN):
            versions = folder / f"{library}.versions"
            versions.write_text(f"{library} {{ global: *; }};\n")
            options.append(f"-Wl,--version-script={versions}")
        _gcc("-shared", *options, "-o", folder / library, compiled, rest)
    return os.environ | {"LD_LIBRARY_PATH": str(folder)}


def _names() -> dict[str, set[str]]:
    """The functions of CUDA that ONNX Runtime's provider and onnxruntime-genai ask for, by library."""
    names: dict[str, set[str]] = {_DRIVER: set(_ASKED_BY_POPCOMPILE), _CUDNN: set()}
    for user in _USERS:
        command = ["nm", "-D", "--undefined-only", str(user)]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        strings = user.read_bytes()
        for library in re.findall(rb"\0(libcu\w+\.so\.\d+)(?=\0)", strings):
            names.setdefault(library.decode(), set())
        for name, library in re.findall(r" U (\w+)@(libcu\w+\.so\.\d+)$", listed, re.MULTILINE):
            names[library].add(name)
        names[_DRIVER].update(re.findall(r" U (cu[A-Z]\w+)$", listed, re.MULTILINE))
        names[_CUDNN].update(name.decode() for name in re.findall(rb"\0(cudnn[A-Z]\w+)(?=\0)", strings))
    return names


def _gcc(*arguments: str | Path) -> None:
    subprocess.run(["gcc", "-w", "-fPIC", *arguments], check=True)
