"""What llama-quantize does, which is in no registry: python quantize_gguf.py LIBRARIES IN OUT TYPE

LIBRARIES: a folder of libggml and libllama, as node-llama-cpp brings it. TYPE: q8_0 or q4_0; llama.cpp
leaves some tensors in other types.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

#: `llama_ftype` of llama.h
_TYPES = {"q4_0": 2, "q8_0": 7}


class _Parameters(ctypes.Structure):
    """`llama_model_quantize_params`: its first two fields, and room for those of any release."""

    _fields_ = (("nthread", ctypes.c_int32), ("ftype", ctypes.c_int), ("others", ctypes.c_byte * 1024))


def main() -> None:
    folder, source, out, kind = sys.argv[1:]
    _library(folder, "ggml").ggml_backend_load_all_from_path(folder.encode())
    llama = _library(folder, "llama")
    llama.llama_model_quantize_default_params.restype = _Parameters
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype = _TYPES[kind]
    sys.exit(llama.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters)))


def _library(folder: str, name: str) -> ctypes.CDLL:
    """libNAME.VERSION.so, NAME.VERSION.dll or libNAME.VERSION.dylib."""
    return ctypes.CDLL(str(next(Path(folder).glob(f"*{name}.*"))))


if __name__ == "__main__":
    main()
