"""Fuse rotary position embedding into one node that reads a precomputed table.

    x * cos(positions) + cat(-x[half:], x[:half]) * sin(positions)   =>   rotary_embedding(x, positions, cos, sin)

The traced graph computes cos and sin from the RoPE frequencies for every prompt. They depend on the position only, so
they become two tables [max positions, half], evaluated by running those very nodes: llama3, linear or any other
scaling comes out right without a case for it.

Some frequencies depend on one truth about the whole call as well: longrope has others where the largest position is
beyond the length of pretraining. Such tables have a part for either case, one after the other:

    rotary_embedding(x, positions + largest_is_beyond * max positions, [cos; cos_beyond], [sin; sin_beyond])
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from . import ops
from .base import Pass
from .graph import (
    dependencies,
    dimension_symbols,
    emit,
    evaluate_dim,
    find,
    has_symbol,
    is_size,
    register_parameter,
    replace,
    shape_of,
    value_of,
)
from .parameters import Derived, extract

aten = torch.ops.aten


class _Origin(NamedTuple):
    """What cos and sin are computed from: truths about all positions, at most one, constants, and the nodes that do."""

    switches: list[fx.Node]
    constants: list[fx.Node]
    body: list[fx.Node]


class FuseRotaryEmbedding(Pass):
    def __init__(self) -> None:
        super().__init__()
        self._tables: dict[tuple[fx.Node, fx.Node], tuple[fx.Node, fx.Node, fx.Node] | None] = {}
        self._shifted: dict[fx.Node, fx.Node] = {}

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.check(len(find(graph_module, op=ops.token_positions)) == 1, "the graph needs one token_positions node")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        positions = find(graph_module, op=ops.token_positions)[0]
        for add in find(graph_module, op=aten.add.Tensor):
            if match := _match(add):
                x, cos, sin = match
                if (cos, sin) not in self._tables:
                    self._tables[cos, sin] = self._make_tables(graph_module, positions, cos, sin)
                tables = self._tables[cos, sin]
                if tables is not None:
                    with graph_module.graph.inserting_before(add):
                        fused = emit(graph_module.graph, ops.rotary_embedding, x, *tables, like=_first_mul(add))
                    replace(add, fused)
                    self.matches += 1
        graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        positions = find(graph_module, op=ops.token_positions)[0]
        matches = [(add, match) for add in find(graph_module, op=aten.add.Tensor) if (match := _match(add))]
        left = [add.name for add, (_, cos, sin) in matches if self._origin(graph_module, positions, cos, sin)]
        self.check(not left, f"the rotations {left} are left in steps")

    def _origin(self, gm: fx.GraphModule, positions: fx.Node, cos: fx.Node, sin: fx.Node) -> _Origin | None:
        """What cos and sin are computed from.

        None if they depend on more than positions, a truth about all of them, and constants.
        """
        switches = _switches([cos, sin], positions)
        needed = _table_nodes([cos, sin], [positions, *switches])
        constants = sorted((n for n in needed if n.op == "get_attr"), key=lambda n: str(n.target))
        body = [n for n in gm.graph.nodes if n in needed and n.op == "call_function"]
        if (
            len(switches) > 1
            or any(n.op == "placeholder" for n in needed)
            or any(str(n.target) not in self.program.constants for n in constants)
            or not _apart(body, positions)
        ):
            return None
        return _Origin(switches, constants, body)

    def _make_tables(
        self, gm: fx.GraphModule, positions: fx.Node, cos: fx.Node, sin: fx.Node
    ) -> tuple[fx.Node, fx.Node, fx.Node] | None:
        """Rows to read, [B, S], and initializers for the cos and sin tables; None if there can be no tables."""
        if (origin := self._origin(gm, positions, cos, sin)) is None:
            return None
        switches, constants, body = origin
        inputs = [positions, *switches]
        sizes = self._table_sizes(gm, {*constants, *body})
        half, length = shape_of(cos)[-1] // 2, self.program.max_positions
        sources = tuple(str(n.target) for n in constants)
        stem = sources[0].removesuffix(".inv_freq").removesuffix("_inv_freq") if sources else "rotary_embedding"
        nodes = []
        for value, kind in ((cos, "cos_cache"), (sin, "sin_cache")):
            only = _table_nodes([value], inputs)
            graph = extract([value], [*constants, *inputs], [n for n in body if n in only], sizes)
            table = Derived(sources, _table_of(graph, len(constants), length, half))
            name = f"{stem}.{kind}"
            self.program.derived[name] = table
            with value_of(cos).fake_mode:
                fake = torch.empty(((1 + len(switches)) * length, half), dtype=value_of(cos).dtype)
            register_parameter(gm, name, fake)
            with gm.graph.inserting_after(positions):
                node = gm.graph.get_attr(name)
            node.meta["val"] = fake
            nodes.append(node)
        rows = self._shift(gm.graph, positions, switches[0]) if switches else positions
        return rows, nodes[0], nodes[1]

    def _shift(self, graph: fx.Graph, positions: fx.Node, switch: fx.Node) -> fx.Node:
        """Rows of tables with a part for either state of a switch, [B, S]."""
        if switch not in self._shifted:
            with graph.inserting_after(switch):
                state = emit(graph, aten.to.dtype, switch, torch.int64)
            with graph.inserting_after(state):
                offset = emit(graph, aten.mul.Tensor, state, self.program.max_positions)
            with graph.inserting_after(offset):
                self._shifted[switch] = emit(graph, aten.add.Tensor, positions, offset)
        return self._shifted[switch]

    def _table_sizes(self, gm: fx.GraphModule, needed: set[fx.Node]) -> dict[fx.Node, int]:
        """The sizes that these nodes read, for one row of all positions."""
        symbols = dimension_symbols(gm)
        table = {symbols["batch"]: 1, symbols["sequence"]: self.program.max_positions}
        read = {n for node in needed for n in node.all_input_nodes if is_size(n)}
        return {n: evaluate_dim(value_of(n), table) for n in read}


def _table_nodes(roots: list[fx.Node], inputs: list[fx.Node]) -> set[fx.Node]:
    """What the values are computed from, as far as the inputs and sizes."""
    return dependencies(roots, lambda n: n not in inputs and not is_size(n))


def _switches(roots: list[fx.Node], positions: fx.Node) -> list[fx.Node]:
    """The truths about all positions, scalars, that the values depend on."""
    nodes = [n for n in _table_nodes(roots, [positions]) if isinstance(value_of(n), torch.Tensor)]
    candidates = [n for n in nodes if shape_of(n) == () and value_of(n).dtype is torch.bool]
    return sorted(n for n in candidates if positions in dependencies([n], lambda _: True))


def _apart(body: list[fx.Node], positions: fx.Node) -> bool:
    """Whether a position's row of the values depends on no other position: nothing gathers them."""
    sequence = shape_of(positions)[1].node.expr
    dependent = {positions}
    for node in body:
        if dependent & set(node.all_input_nodes):
            dependent.add(node)
            values = value_of(node) if isinstance(value_of(node), list | tuple) else [value_of(node)]
            if not all(any(has_symbol(d, sequence) for d in value.shape) for value in values):
                return False
    return True


def _table_of(rotary: fx.GraphModule, constants: int, length: int, half: int) -> fx.GraphModule:
    """Wrap a graph (constants..., positions, switches...) -> [1, length, 2 * half] into constants -> [rows, half].

    Rows are `length`, or with a switch twice as many: those where it is false, and those where it is true.
    """
    graph = fx.Graph()
    placeholders = [n for n in rotary.graph.nodes if n.op == "placeholder"]
    inputs = [graph.placeholder(f"constant_{i}") for i in range(constants)]
    positions = graph.call_function(torch.arange, (length,))
    row = graph.call_function(aten.unsqueeze.default, (positions, 0))
    parts = []
    states: list[tuple[bool, ...]] = [()] if len(placeholders) == constants + 1 else [(False,), (True,)]
    for state in states:
        switches = [graph.call_function(torch.full, ((), value), {"dtype": torch.bool}) for value in state]
        mapping = dict(zip(placeholders, [*inputs, row, *switches], strict=True))
        result = graph.graph_copy(rotary.graph, mapping)
        table = graph.call_function(aten.reshape.default, (result, [length, 2 * half]))
        parts.append(graph.call_function(aten.slice.Tensor, (table, 1, 0, half)))
    graph.output(parts[0] if len(parts) == 1 else graph.call_function(aten.cat.default, (parts, 0)))
    return fx.GraphModule(torch.nn.Module(), graph)


def _match(add: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(x, cos, sin) of one rotation, cos and sin as they were before the head dimension was added."""
    if not all(isinstance(a, fx.Node) and a.target == aten.mul.Tensor for a in add.args):
        return None
    one, other = add.args
    for straight, crossed in ((one, other), (other, one)):
        for rotated, sin in (crossed.args, reversed(crossed.args)):
            x = _rotated_half_of(rotated)
            if x is None or x not in straight.args:
                continue
            cos = straight.args[1] if straight.args[0] is x else straight.args[0]
            tables = _without_head_dim(cos), _without_head_dim(sin)
            if tables[0] is not None and tables[1] is not None:
                return x, tables[0], tables[1]
    return None


def _rotated_half_of(node: object) -> fx.Node | None:
    """x, where node is cat(-x[..., half:], x[..., :half])."""
    if not isinstance(node, fx.Node) or node.target != aten.cat.default:
        return None
    parts = node.args[0]
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        return None
    negated, first = parts
    if not isinstance(negated, fx.Node) or negated.target != aten.neg.default or not isinstance(first, fx.Node):
        return None
    second = negated.args[0]
    if not isinstance(second, fx.Node) or second.target != aten.slice.Tensor or first.target != aten.slice.Tensor:
        return None
    x = first.args[0]
    if x is not second.args[0] or not isinstance(x, fx.Node):
        return None
    size = shape_of(x)[-1]
    last_dim = len(shape_of(x)) - 1
    dims = [d % len(shape_of(x)) for d in (first.args[1], second.args[1])]
    covers = first.args[2:4] == (0, size // 2) and second.args[2] == size // 2 and second.args[3] >= size
    return x if covers and dims == [last_dim, last_dim] else None


def _without_head_dim(node: object) -> fx.Node | None:
    if not isinstance(node, fx.Node) or node.target != aten.unsqueeze.default or node.args[1] != 1:
        return None
    before = node.args[0]
    assert isinstance(before, fx.Node)
    return before if len(shape_of(before)) == 3 else None


def _first_mul(add: fx.Node) -> fx.Node:
    node = add.args[0]
    assert isinstance(node, fx.Node)
    return node
