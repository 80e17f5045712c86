"""Compile Hugging Face decoders into ONNX Runtime packages with Prefill-Only Pruning (arXiv 2602.03295).

In Python:

    import popcompile

    manifest = popcompile.convert("path/or/hub-id", "out/", prune="1/3")
    model = popcompile.load("out/", provider="cpu", prefill="auto")
    model.generate(**inputs, max_new_tokens=64)
"""

from typing import TYPE_CHECKING, Any

from popcompile.errors import PopcompileError

if TYPE_CHECKING:
    __version__: str
    from popcompile.conversion import convert
    from popcompile.package.configs import load_processor
    from popcompile.runtime.generation import PopForCausalLM, load
    from popcompile.runtime.image_text import PopForImageTextToText

__all__ = [
    "PopForCausalLM", "PopForImageTextToText", "PopcompileError", "__version__", "convert", "load", "load_processor",
]  # fmt: skip

_LAZY = {
    "convert": "popcompile.conversion",
    "load": "popcompile.runtime.generation",
    "load_processor": "popcompile.package.configs",
    "PopForCausalLM": "popcompile.runtime.generation",
    "PopForImageTextToText": "popcompile.runtime.image_text",
}


def __getattr__(name: str) -> Any:
    """Import torch, transformers and onnxruntime when they are first needed: `popcompile --help` is quick."""
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    if name == "__version__":
        from importlib.metadata import version

        return version("popcompile")
    raise AttributeError(f"module 'popcompile' has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
