"""What pruning costs: a package's pruned prefill against the full model that it holds as well."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from popcompile.evaluation.compare import evaluate

__all__ = ["evaluate"]


def __getattr__(name: str) -> Any:
    """Import it where it is first needed: what only reads one file of this folder stays quick."""
    if name in __all__:
        from importlib import import_module

        return getattr(import_module("popcompile.evaluation.compare"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
