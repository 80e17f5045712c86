"""The first NVIDIA GPU, asked through its driver: ONNX Runtime does not say, and PyTorch may be a build without CUDA.

https://docs.nvidia.com/cuda/cuda-driver-api/
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os


def has_gpu() -> bool:
    """ONNX Runtime itself lists CUDA wherever it was built with it."""
    return _driver() is not None


def gpu_name() -> str | None:
    """Its product name; None without a GPU."""
    name = ctypes.create_string_buffer(256)
    if (driver := _driver()) is None or driver.cuDeviceGetName(name, len(name), 0):
        return None
    return name.value.decode(errors="replace")


def gpu_bytes() -> int | None:
    """Memory of it that is taken, by any process; None without a GPU. This process's context is among it."""
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    if (driver := _driver()) is None or driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0):
        return None
    failed = driver.cuCtxPushCurrent_v2(context) or driver.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    driver.cuCtxPopCurrent_v2(ctypes.byref(context))
    return None if failed else total.value - free.value


def _driver() -> ctypes.CDLL | None:
    name = "nvcuda.dll" if os.name == "nt" else ctypes.util.find_library("cuda") or "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
        count = ctypes.c_int()
        works = driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except (OSError, AttributeError):
        return None
    return driver if works else None
