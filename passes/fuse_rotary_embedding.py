"""Fuse rotary position embedding into one node that reads a precomputed table.

    x * cos(positions) + cat(-x[half:], x[:half]) * sin(positions)   =>   rotary_embedding(x, positions, cos, sin)

The traced graph computes cos and sin from the RoPE frequencies for every prompt. They depend on the position only, so
they become two tables [max positions, half], evaluated by running those very nodes: llama3, linear or any other
scaling comes out right without a case for it.

Some frequencies depend on one truth about the whole call as well: longrope has others where the largest position is
beyond the length of pretraining. Such tables have a part for either case, one after the other:

    rotary_embedding(x, positions + largest_is_beyond * max positions, [cos; cos_beyond], [sin; sin_beyond])

With M-RoPE a token has several positions, and each pair of a head turns by one of them. Which one is found by running
the nodes as well, moving one position at a time, so that any order of the sections comes out right:

    rotary_embedding_axes(x, rope_positions(position_ids), cos, sin, [0, 1, 2, 0, 1, 2, 0, 0])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx
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
    position_ids_of,
    register_parameter,
    replace,
    shape_of,
    value_of,
)
from .parameters import Derived, extract

aten = torch.ops.aten


#: positions that are tried to find a pair's axis
_PROBES = 64


class _Origin(NamedTuple):
    """What cos and sin are computed from: positions, [B, S] or [A, B, S], truths about all of them, at most one,
    constants, and the nodes that do.
    """

    positions: fx.Node
    switches: list[fx.Node]
    constants: list[fx.Node]
    body: list[fx.Node]

    @property
    def axes(self) -> int:
        """How many positions a token has; 0 for one that is no list of them."""
        shape = shape_of(self.positions)
        return int(shape[0]) if len(shape) == 3 else 0


class _Tables(NamedTuple):
    """rows: [B, S], or [B, S, A] where axes has the one of every pair. cos, sin: initializers [positions, half]."""

    rows: fx.Node
    cos: fx.Node
    sin: fx.Node
    axes: list[int] | None

    def rotate(self, graph: fx.Graph, x: fx.Node, like: fx.Node) -> fx.Node:
        if self.axes is None:
            return emit(graph, ops.rotary_embedding, x, self.rows, self.cos, self.sin, like=like)
        return emit(graph, ops.rotary_embedding_axes, x, self.rows, self.cos, self.sin, self.axes, like=like)


class FuseRotaryEmbedding(Pass):
    def __init__(self) -> None:
        super().__init__()
        self._tables: dict[tuple[fx.Node, fx.Node], _Tables | None] = {}
        self._shifted: dict[fx.Node, fx.Node] = {}
        self._axes_last: fx.Node | None = None

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.check(len(find(graph_module, op=ops.token_positions)) == 1, "the graph needs one token_positions node")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for add in find(graph_module, op=aten.add.Tensor):
            if match := _match(add):
                x, cos, sin = match
                if (cos, sin) not in self._tables:
                    self._tables[cos, sin] = self._make_tables(graph_module, cos, sin)
                tables = self._tables[cos, sin]
                if tables is not None:
                    with graph_module.graph.inserting_before(add):
                        fused = tables.rotate(graph_module.graph, x, like=_first_mul(add))
                    replace(add, fused)
                    self.matches += 1
        graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        matches = [(add, match) for add in find(graph_module, op=aten.add.Tensor) if (match := _match(add))]
        left = [add.name for add, (_, cos, sin) in matches if self._origin(graph_module, cos, sin)]
        self.check(not left, f"the rotations {left} are left in steps")

    def _origin(self, gm: fx.GraphModule, cos: fx.Node, sin: fx.Node) -> _Origin | None:
        """What cos and sin are computed from.

        None if they depend on more than positions, a truth about all of them, and constants.
        """
        positions = _positions_of(gm, [cos, sin])
        switches = _switches([cos, sin], positions)
        needed = _table_nodes([cos, sin], [positions, *switches])
        constants = sorted((n for n in needed if n.op == "get_attr"), key=lambda n: str(n.target))
        body = [n for n in gm.graph.nodes if n in needed and n.op == "call_function"]
        if (
            len(switches) > 1
            or any(n.op == "placeholder" for n in needed)
            or any(str(n.target) not in self.program.constants for n in constants)
            or not _apart(gm, body, positions)
        ):
            return None
        return _Origin(positions, switches, constants, body)

    def _make_tables(self, gm: fx.GraphModule, cos: fx.Node, sin: fx.Node) -> _Tables | None:
        """Rows to read, and initializers for the cos and sin tables; None if there can be no tables."""
        if (origin := self._origin(gm, cos, sin)) is None:
            return None
        axes = self._find_axes(gm, origin, cos, sin) if origin.axes else None
        positions, switches, constants, body = origin
        inputs = [positions, *switches]
        sizes = self._table_sizes(gm, {*constants, *body}, self.program.max_positions)
        half, length = shape_of(cos)[-1] // 2, self.program.max_positions
        sources = tuple(str(n.target) for n in constants)
        stem = self._stem(sources)
        rows = self._tokens_first(gm, positions) if origin.axes else positions
        nodes = []
        for value, kind in ((cos, "cos_cache"), (sin, "sin_cache")):
            only = _table_nodes([value], inputs)
            graph = extract([value], [*constants, *inputs], [n for n in body if n in only], sizes)
            table = Derived(sources, _table_of(graph, len(constants), length, half, origin.axes))
            name = f"{stem}.{kind}"
            self.program.derived[name] = table
            with value_of(cos).fake_mode:
                fake = torch.empty(((1 + len(switches)) * length, half), dtype=value_of(cos).dtype)
            register_parameter(gm, name, fake)
            with gm.graph.inserting_after(rows):
                node = gm.graph.get_attr(name)
            node.meta["val"] = fake
            nodes.append(node)
        rows = self._shift(gm.graph, rows, switches[0]) if switches else rows
        return _Tables(rows, nodes[0], nodes[1], axes)

    def _stem(self, sources: Sequence[str]) -> str:
        """What tables are called after: the frequencies that they are made of. No other tables have the name."""
        frequencies = (name for name in sources if name.endswith("inv_freq"))
        stem = next(frequencies, "rotary_embedding").removesuffix(".inv_freq").removesuffix("_inv_freq")
        names = (stem, *(f"{stem}_{number}" for number in range(1, len(self._tables) + 1)))
        return next(name for name in names if f"{name}.cos_cache" not in self.program.derived)

    def _tokens_first(self, gm: fx.GraphModule, positions: fx.Node) -> fx.Node:
        """The graph's rope_positions node, [B, S, A]; made on first use."""
        if self._axes_last is None:
            with gm.graph.inserting_after(find(gm, op=ops.token_positions)[0]):
                self._axes_last = emit(gm.graph, ops.rope_positions, positions)
            self._axes_last.meta["role"] = "rope_positions"
        return self._axes_last

    def _find_axes(self, gm: fx.GraphModule, origin: _Origin, cos: fx.Node, sin: fx.Node) -> list[int]:
        """The axis of positions [A, B, S] that each pair turns by. Raises ContractError where one turns by several."""
        positions, switches, constants, body = origin
        sizes = self._table_sizes(gm, {*constants, *body}, _PROBES)
        graph = extract([cos, sin], [*constants, positions, *switches], body, sizes)
        values = [self.program.constants[str(n.target)] for n in constants]
        half = shape_of(cos)[-1] // 2
        found = []
        for state in _states(len(switches)):

            def rotations(rows: Tensor, state: tuple[bool, ...] = state) -> Tensor:
                both = graph(*values, rows[:, None], *(torch.tensor(value) for value in state))
                return torch.stack([t.reshape(_PROBES, 2 * half)[:, :half] for t in both])

            with torch.no_grad():
                found.append(_axis_of_each_pair(rotations, origin.axes, self.program.max_positions))
        self.check(
            found[0] is not None and all(axes == found[0] for axes in found),
            f"a pair of {cos.name} turns by none of the {origin.axes} positions of a token alone",
        )
        assert found[0] is not None
        return found[0]

    def _shift(self, graph: fx.Graph, positions: fx.Node, switch: fx.Node) -> fx.Node:
        """Rows of tables with a part for either state of a switch, of the positions' shape."""
        if switch not in self._shifted:
            with graph.inserting_after(switch):
                state = emit(graph, aten.to.dtype, switch, torch.int64)
            with graph.inserting_after(state):
                offset = emit(graph, aten.mul.Tensor, state, self.program.max_positions)
            with graph.inserting_after(offset):
                self._shifted[switch] = emit(graph, aten.add.Tensor, positions, offset)
        return self._shifted[switch]

    @staticmethod
    def _table_sizes(gm: fx.GraphModule, needed: set[fx.Node], length: int) -> dict[fx.Node, int]:
        """The sizes that these nodes read, for one row of so many positions."""
        symbols = dimension_symbols(gm)
        table = {symbols["batch"]: 1, symbols["sequence"]: length}
        read = {n for node in needed for n in node.all_input_nodes if is_size(n)}
        return {n: evaluate_dim(value_of(n), table) for n in read}


def _positions_of(gm: fx.GraphModule, roots: list[fx.Node]) -> fx.Node:
    """The positions that values are computed from: those that tokens are given, or those of their slots."""
    given = position_ids_of(gm)
    return given if given in dependencies(roots, lambda _: True) else find(gm, op=ops.token_positions)[0]


def _axis_of_each_pair(rotations: Callable[[Tensor], Tensor], axes: int, length: int) -> list[int] | None:
    """Of several positions the one that each pair turns by; None where a pair turns by more than one.

    rotations: positions [axes, _PROBES] -> cos and sin of every pair [2, _PROBES, half]. length: of all positions.
    A pair turns by an axis if moving that one alone does to it what moving all of them does.
    """
    probes = torch.linspace(0, length - 1, _PROBES).to(torch.int64)
    together = rotations(probes.expand(axes, -1))
    alone = [rotations(probes * (torch.arange(axes) == axis)[:, None]) for axis in range(axes)]
    turns = torch.stack([(moved == together).all(0).all(0) for moved in alone])  # [axes, half]
    if not turns.any(0).all():
        return None
    found = turns.int().argmax(0)
    drawn = torch.randint(_PROBES, (axes, _PROBES), generator=torch.Generator().manual_seed(0))
    composed = together[:, drawn[found].T, torch.arange(len(found))]
    return found.tolist() if torch.equal(composed, rotations(probes[drawn])) else None


def _table_nodes(roots: list[fx.Node], inputs: list[fx.Node]) -> set[fx.Node]:
    """What the values are computed from, as far as the inputs and sizes."""
    return dependencies(roots, lambda n: n not in inputs and not is_size(n))


def _switches(roots: list[fx.Node], positions: fx.Node) -> list[fx.Node]:
    """The truths about all positions, scalars, that the values depend on."""
    tensors = [n for n in _table_nodes(roots, [positions]) if isinstance(value_of(n), Tensor)]
    candidates = [n for n in tensors if shape_of(n) == () and value_of(n).dtype is torch.bool]
    return sorted(n for n in candidates if positions in dependencies([n], lambda _: True))


def _apart(gm: fx.GraphModule, body: list[fx.Node], positions: fx.Node) -> bool:
    """Whether a token's row of the values depends on no other token's positions: nothing gathers them."""
    sequence = dimension_symbols(gm)["sequence"]
    dependent = {positions}
    for node in body:
        if dependent & set(node.all_input_nodes):
            dependent.add(node)
            value = value_of(node)
            parts = value if isinstance(value, list | tuple) else [value]
            if not all(any(has_symbol(d, sequence) for d in part.shape) for part in parts):
                return False
    return True


def _states(switches: int) -> list[tuple[bool, ...]]:
    """What switches may be, of which there is one at most."""
    return [(False,), (True,)] if switches else [()]


def _table_of(rotary: fx.GraphModule, constants: int, length: int, half: int, axes: int) -> fx.GraphModule:
    """Wrap a graph (constants..., positions, switches...) -> [1, length, 2 * half] into constants -> [rows, half].

    Rows are `length`, or with a switch twice as many: those where it is false, and those where it is true. axes: how
    many positions a token has, all of which are the row's; 0 for positions [1, length].
    """
    graph = fx.Graph()
    placeholders = [n for n in rotary.graph.nodes if n.op == "placeholder"]
    inputs = [graph.placeholder(f"constant_{i}") for i in range(constants)]
    positions = graph.call_function(torch.arange, (length,))
    row = graph.call_function(aten.unsqueeze.default, (positions, 0))
    if axes:
        row = graph.call_function(aten.expand.default, (row, [axes, 1, length]))
    parts = []
    for state in _states(len(placeholders) - constants - 1):
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
