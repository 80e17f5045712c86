"""Small helpers over FX graphs that the passes share: roles, layers, symbolic sizes, building nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.node import map_arg

from popcompile.upstream import LazyGraphModule, OpOverload, operator_name

from .fake_values import fake_value


def layer_of(node: fx.Node) -> int | None:
    """The decoder layer that a node belongs to, or None (embedding, head, inputs)."""
    return node.meta.get("layer")


def role_of(node: fx.Node) -> str | None:
    """What a node does in the decoder ("k_proj", "attention", ...), set by AnnotateLayers."""
    return node.meta.get("role")


def find(gm: fx.GraphModule, *, op: Any = None, role: str | None = None, layer: int | None = None) -> list[fx.Node]:
    """Nodes by operator overload, role and layer, in graph order."""
    return [
        n
        for n in gm.graph.nodes
        if (op is None or (n.op == "call_function" and n.target == op))
        and (role is None or role_of(n) == role)
        and (layer is None or layer_of(n) == layer)
    ]


def is_size(node: fx.Node) -> bool:
    """Whether a node computes a size and not a tensor."""
    return isinstance(node.meta.get("val"), int | torch.SymInt)


def value_of(node: fx.Node) -> Any:
    """The fake value (shape and dtype) that a node computes."""
    return node.meta["val"]


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    return tuple(map(settled, node.meta["val"].shape))


def settled(size: Any) -> Any:
    """A dimension as a number where it is one: a quotient of free dimensions may come out as one that is not free."""
    return int(size.node.expr) if isinstance(size, torch.SymInt) and size.node.expr.is_number else size


def inputs_of(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """Placeholders by name, in order."""
    return {str(n.target): n for n in gm.graph.nodes if n.op == "placeholder"}


#: what a decoder's tokens come in as: ids [batch, sequence], or embeddings [batch, sequence, width], which may hold
#: more than what the first layer reads
TOKENS, MASK = ("input_ids", "inputs_embeds"), "attention_mask"
#: positions that RoPE reads, and nothing else, [axes, batch, sequence]: where tokens have more of them than their slot
POSITIONS = "position_ids"


def tokens_of(gm: fx.GraphModule) -> fx.Node:
    """The placeholder of the new tokens."""
    return next(node for name, node in inputs_of(gm).items() if name in TOKENS)


def mask_of(gm: fx.GraphModule) -> fx.Node:
    """The placeholder of the mask [batch, past + sequence]: 1 for tokens that count."""
    return inputs_of(gm)[MASK]


def cache_of(gm: fx.GraphModule) -> list[fx.Node]:
    """The placeholders of the cache, key and value of every layer [batch, kv_heads, past, head]."""
    return [node for name, node in inputs_of(gm).items() if name.startswith("past_key_values")]


def position_ids_of(gm: fx.GraphModule) -> fx.Node | None:
    """The placeholder of the positions that RoPE reads [axes, batch, sequence], where a token has several."""
    return inputs_of(gm).get(POSITIONS)


def output_of(gm: fx.GraphModule) -> fx.Node:
    return next(iter(reversed(gm.graph.nodes)))


def outputs_of(gm: fx.GraphModule) -> tuple[fx.Node, ...]:
    """The values that the graph returns, flat: logits, then key and value of every layer."""
    returned = output_of(gm).args[0]
    assert isinstance(returned, list | tuple)
    return tuple(returned)


def call_nodes(gm: fx.GraphModule) -> list[fx.Node]:
    """Nodes that compute something."""
    return [n for n in gm.graph.nodes if n.op == "call_function"]


# --- symbolic sizes --------------------------------------------------------------------------------------------


#: where a graph that is no decoder's says in its meta which free dimensions it has: name -> sympy symbol
DIMENSIONS = "dimensions"


def dimension_symbols(gm: fx.GraphModule) -> dict[str, sympy.Symbol]:
    """A graph's free dimensions as sympy symbols: of a decoder batch, sequence, total (= past + sequence) and past."""
    if DIMENSIONS in gm.meta:
        return dict(gm.meta[DIMENSIONS])
    tokens, mask = shape_of(tokens_of(gm)), shape_of(mask_of(gm))
    past = next(map(shape_of, cache_of(gm)), None)
    dims = {"batch": tokens[0], "sequence": tokens[1], "total": mask[1], "past": past[2] if past else 0}
    return {name: dim.node.expr for name, dim in dims.items() if isinstance(dim, torch.SymInt)}


def dimension_names(gm: fx.GraphModule) -> dict[str, str]:
    return {str(symbol): name for name, symbol in dimension_symbols(gm).items()}


def has_symbol(dim: Any, symbol: sympy.Symbol) -> bool:
    return isinstance(dim, torch.SymInt) and symbol in dim.node.expr.free_symbols


def evaluate_dim(dim: Any, sizes: dict[sympy.Symbol, int]) -> int:
    """A possibly symbolic dimension as a number, for given sizes of the free dimensions."""
    return _evaluated(dim.node.expr, tuple(sizes.items())) if isinstance(dim, torch.SymInt) else int(dim)


@lru_cache(maxsize=4096)  # a graph has thousands of dimensions, and few different ones
def _evaluated(dim: sympy.Expr, sizes: tuple[tuple[sympy.Symbol, int], ...]) -> int:
    return int(dim.subs(sizes))


# --- building --------------------------------------------------------------------------------------------------


def fake_mode_of(graph: fx.Graph) -> Any:
    return next(v.fake_mode for n in graph.nodes if hasattr(v := n.meta.get("val"), "fake_mode"))


def emit(
    graph: fx.Graph,
    target: Callable[..., Any],
    *args: Any,
    like: fx.Node | None = None,
    **kwargs: Any,
) -> fx.Node:
    """Append a call at the graph's insertion point and compute its fake value.

    `like` passes on the metadata of another node (layer, role, module path).
    """
    name = operator_name(target) if isinstance(target, OpOverload) else None
    if target.__name__.startswith("symbolic"):
        name = str(args[0]).rpartition("::")[2]
    node = graph.create_node("call_function", target, args, kwargs, name=name)
    if like is not None:
        node.meta = {k: v for k, v in like.meta.items() if k != "val"}
    set_value(node)
    return node


def set_value(node: fx.Node) -> None:
    """Recompute a call's fake value from those of its arguments."""
    args, kwargs = map_arg((node.args, node.kwargs), value_of)
    assert callable(node.target)
    node.meta["val"] = fake_value(fake_mode_of(node.graph), node.target, args, kwargs)


def emit_sizes(graph: fx.Graph, x: fx.Node) -> list[int | fx.Node]:
    """The dimensions of x at the graph's insertion point: numbers, and nodes that compute the free ones."""
    return [
        d if isinstance(d, int) else emit(graph, torch.ops.aten.sym_size.int, x, i) for i, d in enumerate(shape_of(x))
    ]


def emit_parameter(gm: fx.GraphModule, name: str, shape: Sequence[int], dtype: torch.dtype) -> fx.Node:
    """A get_attr node at the graph's insertion point for a parameter of that name, registered on first use."""
    with fake_mode_of(gm.graph):
        value = torch.empty(*shape, dtype=dtype)
    register_parameter(gm, name, value)
    node = gm.graph.get_attr(name)
    node.meta["val"] = value
    return node


def replace(node: fx.Node, by: fx.Node) -> None:
    """Let every user of `node` use `by` instead, and drop `node`."""
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def clone_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph over the same parameters, whose code is made when it is first run."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    returned = graph.graph_copy(gm.graph, mapping)
    graph.output(returned)
    clone = LazyGraphModule(gm, graph)
    clone.meta = dict(gm.meta)
    return clone


def dependencies(roots: Iterable[fx.Node], within: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Everything that `roots` are computed from, walking backwards through nodes for which `within` holds."""
    found: set[fx.Node] = set()
    stack = [n for n in roots if within(n)]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(n for n in node.all_input_nodes if within(n))
    return found


def walk_back(node: fx.Node, stop: Callable[[fx.Node], bool]) -> fx.Node | None:
    """The nearest node at or before `node`, along first inputs, for which `stop` holds."""
    current: fx.Node | None = node
    while current is not None and not stop(current):
        current = next((n for n in current.all_input_nodes if n.op != "get_attr"), None)
    return current


def runs(layers: Iterable[int], joined: Callable[[int], bool] = lambda _: True) -> Iterator[tuple[int, int]]:
    """Maximal runs of consecutive numbers: [1, 2, 5] -> (1, 2), (5, 5).

    joined: whether a number and the next one may be in one run; asked only where both are there.
    """
    ordered = sorted(layers)
    start = 0
    for i, layer in enumerate(ordered):
        if i + 1 == len(ordered) or ordered[i + 1] != layer + 1 or not joined(layer):
            yield ordered[start], layer
            start = i + 1


def register_parameter(gm: fx.GraphModule, name: str, fake: torch.Tensor) -> None:
    """Make `name` (dotted) an attribute of the graph module, in place of what has the name, for get_attr nodes."""
    path, _, leaf = name.rpartition(".")
    module: torch.nn.Module = gm
    for part in path.split(".") if path else []:
        if not isinstance(child := getattr(module, part, None), torch.nn.Module):
            child = torch.nn.Module()
            module.add_module(part, child)
        module = child
    if hasattr(module, leaf):
        delattr(module, leaf)
    module.register_buffer(leaf, fake)
