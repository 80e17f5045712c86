"""A package answers: ONNX Runtime's sessions over one mapping of the weights, a transformers model, a chat, a check."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from popcompile.runtime.session import Runtime

__all__ = ["Runtime"]


def __getattr__(name: str) -> Any:
    """Import it where it is first needed: what only reads one file of this folder stays quick."""
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("popcompile.runtime.session"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
