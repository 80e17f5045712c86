"""What rules, which write an operator in ONNX each (operators.py), are made with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from popcompile.passes.graph import shape_of, value_of

from .writer import Rule, Writer


class Rules(dict[Any, Rule]):
    """Rules by the operator that they write."""

    def of(self, *targets: Any) -> Callable[[Rule], Rule]:
        """Register the decorated rule for these operators."""

        def register(written: Rule) -> Rule:
            self.update(dict.fromkeys(targets, written))
            return written

        return register


def arguments(node: fx.Node, **defaults: Any) -> tuple[Any, ...]:
    """A call's first arguments, by the operator's names for them; those that are not given are the defaults."""
    given = dict(zip(defaults, node.args, strict=False)) | node.kwargs
    return tuple(given.get(name, default) for name, default in defaults.items())


def dtype_of(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = value_of(node).dtype
    return dtype


def counted(w: Writer, count: ir.Value) -> ir.Value:
    """0, 1, ... before `count` [1]."""
    return w.kept(("range", count), lambda: w("Range", w.constant(0), w("Squeeze", count), w.constant(1)))


def same_size(a: Any, b: Any) -> bool:
    """Whether two dimensions are one, without asking what a free one may be."""
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt):
        return bool(a.node.expr == b.node.expr)
    return isinstance(a, int) and isinstance(b, int) and a == b


def reshape(writer: Writer, x: fx.Node, node: fx.Node, sizes: Sequence[Any] | None = None) -> Any:
    """x in the shape of `node`: 0 keeps a free size where it is, one -1 is what remains. sizes: nodes that compute it,
    for a shape that this does not say.
    """
    before, after = shape_of(x), shape_of(node)
    settled = [
        size if isinstance(size, int) else 0 if place < len(before) and same_size(before[place], size) else -1
        for place, size in enumerate(after)
    ]
    if settled.count(-1) <= 1 and 0 not in [size for size in after if isinstance(size, int)]:
        target = writer.constant(settled)
    elif sizes is None:
        return NotImplemented
    else:
        target = writer.sizes(sizes)
    return writer("Reshape", writer[x], target)
