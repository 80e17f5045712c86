"""What maps of a vision-language model lose on text and on prompts with images, by what they are fitted to: one table.

    python examples/image_calibration_study.py MODEL --layers 3-5

KL in nats of first tokens ± standard error over prompts, KL of the tokens after them, and perplexity over the whole
model's, of prompts that nothing was fitted to; the lists' column is the KL of answers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from tabulate import tabulate

from popcompile.frontend.checkpoint import Checkpoint
from popcompile.frontend.source import open_source
from popcompile.frontend.tracing import trace
from popcompile.package.report import Loss
from popcompile.passes import PassManager, canonicalization
from popcompile.pruning.analyze import source_tokenizer
from popcompile.pruning.calibration_set import calibration_set
from popcompile.pruning.execution import HeldParameters, checked, materialise
from popcompile.pruning.hidden_states import HiddenStates
from popcompile.pruning.image_prompts import asking_processor, image_source
from popcompile.pruning.layerwise import LayerwiseModel
from popcompile.pruning.refinement import refine
from popcompile.pruning.regression import Calibration, calibrate
from popcompile.pruning.request import parse_request
from popcompile.pruning.rows import Rows, decoder_inputs
from popcompile.pruning.text import SELF, TEXTS, WINDOW
from popcompile.report.words import answers_cell, kl_cell, ratio, small
from popcompile.vision.tracing import build_model, trace_images


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a vision-language model: hub id or folder")
    parser.add_argument("--layers", required=True, help="pruned layers, for example 3-5")
    parser.add_argument("--window", type=int, default=WINDOW, help=f"last tokens that take every layer ({WINDOW})")
    parser.add_argument("--texts", type=int, default=TEXTS, help=f"rows to calibrate on ({TEXTS})")
    parser.add_argument("--images", type=Path, help="a folder with pictures, in place of self-made ones")
    parser.add_argument("--steps", type=int, default=0, help="of refinement of the maps of both kinds (default 0)")
    parser.add_argument("--prompt-tokens", type=int, default=0, help="of lists that are asked for (default: a row's)")
    options = parser.parse_args()
    source = open_source(options.model)
    pruned = parse_request(source.decoder_config.num_hidden_layers, None, options.layers).layers
    processor = asking_processor(source, options.images)
    if processor is None:
        parser.error(f"{options.model} has no processor with a chat template")
    program = trace(source.config)
    program.add(trace_images(build_model(source.config)))
    images = image_source(processor, source, program, options.images)
    read = HeldParameters(checked(Checkpoint(source, program, torch.float32).read, source.name))
    PassManager(canonicalization()).run(program)
    model = LayerwiseModel(materialise(program.graphs["model"], program, read), decoder_inputs(program, read))
    tokenizer = source_tokenizer(source)
    both, text = (
        calibration_set(
            SELF, program, read, tokenizer, kind, texts=options.texts, window=options.window,
            prompt_tokens=options.prompt_tokens,
        )
        for kind in (images, None)
    )  # fmt: skip
    assert both.images is not None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def fitted(rows: Rows, steps: int = 0) -> Callable[[], Calibration]:
            states = HiddenStates(model, rows, pruned[0], folder)
            return lambda: refine(states, pruned, calibrate(states, pruned), steps=steps)

        variants = {
            "the layers' own projections": Calibration,
            "text alone": fitted(text.text.calibration),
            "images alone, half as many": fitted(both.images.calibration),
            "half text, half images": fitted(both.fit),
        }
        if options.steps:
            variants[f"half text, half images, refined, {options.steps} steps"] = fitted(both.fit, options.steps)
        unseen = both.unseen(model, pruned[0], options.window, 0, folder)
        table = []
        for label, fit in variants.items():
            loss = unseen.measure(pruned, fit())
            assert loss.images is not None
            table.append([label, *_cells(loss), *_cells(loss.images)])
            print(*table[-1], sep=" | ", file=sys.stderr, flush=True)
    headers = ["fitted to", *(f"{kind}: {what}" for kind in ("text", "images") for what in ("KL, after, ppl", "lists"))]
    print(tabulate(table, headers, tablefmt="github", disable_numparse=True))


def _cells(loss: Loss) -> list[str]:
    return [f"{kl_cell(loss)}, {small(loss.kl)}, {ratio(loss.ppl_ratio)}", answers_cell(loss)]


if __name__ == "__main__":
    main()
