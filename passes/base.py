"""A pass, its contract, and the manager that runs passes and keeps the record which `popcompile inspect` shows.

A pass is one idea in one file: `requires` states what the graph must look like before, `call` rewrites it in place,
`ensures` states what holds after. `stages` names the graphs of the program that it works on. The manager lints the
graph after every pass and counts matches, nodes and FLOPs of both stages, so the report is a by-product of compiling
and not a second bookkeeping.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from .contract import ContractError
from .flops import total_flops
from .graph import cache_of, call_nodes, clone_module, inputs_of, is_size
from .parameters import Derived
from .printing import print_graph


@dataclass
class Program:
    """What is being compiled: one graph, "model", until SplitStages makes "prefill" and "decode" of it.

    Beside the decoder's there may be the graphs that make its inputs of images and tokens, "vision" and "embedding".
    """

    graphs: dict[str, fx.GraphModule]
    num_layers: int
    max_positions: int
    #: real values of the model's computed buffers (RoPE frequencies, embedding scales), by attribute name
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    #: initializers that are computed from checkpoint tensors or constants when weights are written
    derived: dict[str, Derived] = field(default_factory=dict)

    @property
    def inputs(self) -> list[str]:
        """Names of the decoder's inputs, in order, but for those of the cache, which follow them."""
        gm = self.graphs["model" if "model" in self.graphs else "prefill"]
        cache = cache_of(gm)
        return [name for name, node in inputs_of(gm).items() if node not in cache]

    def add(self, other: Program) -> None:
        """Take the graphs of another program, over parameters and constants of the same model."""
        self.graphs |= other.graphs
        self.constants |= other.constants

    def clone(self) -> Program:
        """A copy that passes may change. Values of constants are shared."""
        graphs = {stage: clone_module(gm) for stage, gm in self.graphs.items()}
        return replace(self, graphs=graphs, constants=dict(self.constants), derived=dict(self.derived))


@dataclass(frozen=True)
class PassRecord:
    """What one pass did. Dictionaries are per stage; FLOPs are those of the stage's reference sizes (flops.py)."""

    name: str
    summary: str
    matches: int
    nodes_before: dict[str, int]
    nodes_after: dict[str, int]
    flops_before: dict[str, int]
    flops_after: dict[str, int]
    seconds: float


class Pass(PassBase):
    """One transformation. Subclasses count what they matched in `self.matches`."""

    #: graphs that the pass runs on, those that exist
    stages: tuple[str, ...] = ("model",)

    def __init__(self) -> None:
        super().__init__()
        self.matches = 0
        self.program: Program

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def summary(self) -> str:
        """First line of the module's docstring."""
        return (sys.modules[type(self).__module__].__doc__ or "").strip().splitlines()[0]

    def requires(self, graph_module: fx.GraphModule) -> None:
        """What the pass needs of a graph. Raises ContractError; by default, where the graph is malformed."""
        self.check_form(graph_module)

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        raise NotImplementedError  # every pass rewrites; PassBase's contract

    def check_form(self, graph_module: fx.GraphModule) -> None:
        """Raise ContractError, naming the pass, unless torch.fx's lint accepts the graph."""
        try:
            graph_module.graph.lint()
        except RuntimeError as error:  # its message goes on with the whole graph
            raise ContractError(f"{self.name}: {str(error).splitlines()[0]}") from error

    def check(self, holds: bool, message: str) -> None:
        """Raise ContractError, naming the pass, unless `holds`."""
        if not holds:
            raise ContractError(f"{self.name}: {message}")


def _apply(compiler_pass: Pass, gm: fx.GraphModule) -> PassResult:
    """Run a pass. Raises ContractError, also for a structure that the pass took for granted and did not find."""
    try:
        result = compiler_pass(gm)
        assert result is not None
    except ContractError:
        raise
    except Exception as error:
        what = " ".join(str(error).split())[:200]
        raise ContractError(f"{compiler_pass.name}: {type(error).__name__} {what}".rstrip()) from error
    return result


def _transform(compiler_pass: Pass, program: Program) -> dict[str, fx.GraphModule]:
    """Run a pass over the graphs of its stages, in place; returns what it changed or made. Raises ContractError."""
    changed: dict[str, fx.GraphModule] = {}
    for stage in [s for s in compiler_pass.stages if s in program.graphs]:
        before = dict(program.graphs)
        result = _apply(compiler_pass, before[stage])
        if stage in program.graphs:
            program.graphs[stage] = result.graph_module
        for name, graph_module in program.graphs.items():
            if name == stage or graph_module is not before.get(name):
                compiler_pass.check_form(graph_module)
                if result.modified:
                    changed[name] = graph_module
    return changed


class PassManager:
    """Runs passes over a program in order; `observe(index, pass, stage, text before, text after)` sees every graph."""

    def __init__(
        self,
        passes: Sequence[Pass],
        observe: Callable[[int, Pass, str, str, str], None] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.passes = passes
        self.observe = observe
        self.progress = progress

    def run(self, program: Program) -> list[PassRecord]:
        """Transform `program` in place and return one record per pass. Raises ContractError.

        The code of a graph module, which calls of it run, is made anew once, after the last pass.
        """
        records: list[PassRecord] = []
        modified: set[str] = set()
        nodes, flops = self._measure(program.graphs)
        texts = {stage: print_graph(gm, stage) for stage, gm in program.graphs.items()} if self.observe else {}
        for index, compiler_pass in enumerate(self.passes):
            if self.progress:
                self.progress(compiler_pass.name)
            compiler_pass.program = program
            started = time.perf_counter()
            changed = _transform(compiler_pass, program)
            seconds = time.perf_counter() - started
            nodes_changed, flops_changed = self._measure(changed)
            nodes_after, flops_after = nodes | nodes_changed, flops | flops_changed
            records.append(
                PassRecord(
                    name=compiler_pass.name,
                    summary=compiler_pass.summary,
                    matches=compiler_pass.matches,
                    nodes_before=nodes,
                    nodes_after=nodes_after,
                    flops_before=flops,
                    flops_after=flops_after,
                    seconds=round(seconds, 3),
                )
            )
            nodes, flops = nodes_after, flops_after
            modified |= changed.keys()
            texts = self._shown(index, compiler_pass, program, changed, texts)
        for stage in modified & program.graphs.keys():
            program.graphs[stage].recompile()
        return records

    def _shown(
        self, index: int, compiler_pass: Pass, program: Program, changed: Collection[str], texts: Mapping[str, str]
    ) -> dict[str, str]:
        """Let `observe` see all graphs after a pass; returns their texts. changed: stages to print. texts: before."""
        if self.observe is None:
            return {}
        after = {
            stage: print_graph(gm, stage) if stage in changed else texts[stage] for stage, gm in program.graphs.items()
        }
        for stage, text in after.items():
            self.observe(index, compiler_pass, stage, texts.get(stage, texts.get("model", "")), text)
        return after

    def _measure(self, graphs: Mapping[str, fx.GraphModule]) -> tuple[dict[str, int], dict[str, int]]:
        """Node counts and FLOPs of the stages among these graphs. Before the split, the one graph is what both stages
        would run.
        """
        stages = {
            stage: gm for stage in ("prefill", "decode") if (gm := graphs.get(stage) or graphs.get("model")) is not None
        }
        return (
            {stage: sum(not is_size(n) for n in call_nodes(gm)) for stage, gm in stages.items()},
            {stage: total_flops(gm, stage) for stage, gm in stages.items()},
        )
