"""What lies on disk: manifest, graphs, weights, report; written whole, and checked before use. It needs no torch."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from popcompile.package.manifest import Manifest, read_manifest

__all__ = ["Manifest", "read_manifest"]


def __getattr__(name: str) -> Any:
    """Import it where it is first needed: what only reads one file of this folder stays quick."""
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("popcompile.package.manifest"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
