"""What skipping sets of layers costs: python examples/layer_sets.py MODEL 20-29 18,20-21,23-29 [--window 64]

Each set is calibrated in closed form and measured as `popcompile convert` does it, on text sampled from the model
itself and, with a window, on lists of --prompt-tokens whose answers stand in the prompt. Nothing is exported. Prints
the tables of popcompile/pruning/README.md that are about sets.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from tabulate import tabulate

from popcompile.frontend.checkpoint import Checkpoint
from popcompile.frontend.source import open_source
from popcompile.frontend.tracing import trace
from popcompile.package.report import format_layers
from popcompile.passes import PassManager, canonicalization
from popcompile.pruning.analyze import source_tokenizer
from popcompile.pruning.execution import HeldParameters, checked, materialise
from popcompile.pruning.held_out import HeldOut
from popcompile.pruning.hidden_states import HiddenStates
from popcompile.pruning.layerwise import LayerwiseModel
from popcompile.pruning.plan import PROMPT_TOKENS
from popcompile.pruning.regression import Calibration, calibrate
from popcompile.pruning.request import parse_request
from popcompile.pruning.text import SELF, TEXTS, WINDOW, calibration_text
from popcompile.report.words import LOSS_HEADERS, loss_cells


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="hub id, folder or .gguf file")
    parser.add_argument("layers", nargs="+", help="sets of pruned layers, 20-29 for example")
    parser.add_argument("--window", type=int, default=WINDOW, help=f"last tokens that take every layer ({WINDOW})")
    parser.add_argument("--texts", type=int, default=TEXTS, help=f"texts to calibrate on ({TEXTS})")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS, help=f"of the lists ({PROMPT_TOKENS})")
    options = parser.parse_args()
    source = open_source(options.model)
    sets = [parse_request(source.config.num_hidden_layers, None, layers).layers for layers in options.layers]
    program, tokenizer = trace(source.config), source_tokenizer(source)
    read = HeldParameters(checked(Checkpoint(source, program, torch.float32).read, source.name))
    PassManager(canonicalization()).run(program)
    text = calibration_text(
        SELF, program, read, tokenizer, texts=options.texts, window=options.window, prompt_tokens=options.prompt_tokens
    )
    model = LayerwiseModel(materialise(program.graphs["model"], program, read))
    first = min(pruned[0] for pruned in sets)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        states = HiddenStates(model, text.calibration, first, folder)
        held_out = HeldOut(
            model,
            text.held_out,
            first,
            text.prompt,
            0,
            options.window,
            text.retrieval_held_out,
            text.asked_tokens,
            folder,
        )
        rows = []
        for pruned in sets:
            for how, maps in (("calibrated", calibrate(states, pruned)), ("layers' own", Calibration())):
                rows.append([format_layers(pruned), how, *loss_cells(held_out.measure(pruned, maps))])
    print(tabulate(rows, ["pruned", "projections", *LOSS_HEADERS], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
