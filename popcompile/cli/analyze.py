"""`popcompile analyze`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from popcompile.arguments import DEVICE, POSITIVE, SEED, TEXT_ONLY, command, name, new_file, path
from popcompile.terminal import show


def add_analyze(commands: Any) -> None:
    parser = command(
        commands,
        "analyze",
        _analyze,
        "Measure how much prefill and decode need every layer of a model.",
        "popcompile analyze HuggingFaceTB/SmolLM2-135M-Instruct --plot importance.svg",
    )
    parser.add_argument("model", metavar="MODEL", type=name, help="hub id, local folder, or .gguf file")
    parser.add_argument("--per", default="layer", metavar="PART", help="layer (default), or block: attention and MLP")
    parser.add_argument("--texts", metavar="N", type=POSITIVE, default=24, help="texts to measure on (default 24)")
    parser.add_argument("--tokens", metavar="N", type=POSITIVE, default=192, help="tokens of a text (default 192)")
    parser.add_argument("--text", metavar="FILE", type=path, help="take texts from a file, not from the model itself")
    parser.add_argument(
        "--seed", metavar="N", type=SEED, default=0, help="sampling seed of texts and labels (default 0)"
    )
    parser.add_argument("--device", metavar="NAME", default="cpu", help=DEVICE)
    parser.add_argument("--text-only", action="store_true", help=TEXT_ONLY)
    parser.add_argument(
        "--adapter", metavar="DIR", type=name, help="a PEFT adapter (LoRA) to merge into the weights, or a hub id"
    )
    parser.add_argument(
        "--gguf-file", metavar="NAME", type=name, help="the GGUF file to take from the folder or hub id MODEL"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run model code that the checkpoint brings")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--plot", metavar="FILE", type=new_file, help="draw both stages into a .svg or .png file")


def _analyze(options: argparse.Namespace) -> None:
    from popcompile.progress import ANALYZE_STEPS, progress_bar
    from popcompile.pruning.analyze import analyze
    from popcompile.report.plots import require_plot_path, write_importance_plot

    if options.plot:
        require_plot_path(options.plot)
    names = (
        "per", "texts", "tokens", "text", "seed", "text_only", "adapter", "gguf_file", "trust_remote_code", "device",
    )  # fmt: skip
    with progress_bar(ANALYZE_STEPS) as progress:
        found = analyze(options.model, **{name: getattr(options, name) for name in names}, progress=progress)
    show(json.dumps(found.to_json(), indent=2) if options.json else found.table())
    if options.plot:
        write_importance_plot(options.plot, found.importance, f"Importance by stage, {Path(options.model).name}")
