"""`popcompile bench`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from popcompile.arguments import command, count, positive


def add_bench(commands: Any) -> None:
    parser = command(
        commands,
        "bench",
        _bench,
        "Measure time to first token, decoding speed and memory: pruned against full prefill, and against other tools.",
        "popcompile bench out/ --against genai-model/ --plot prefill.svg",
    )
    parser.add_argument("package", metavar="OUT", type=Path, help="package folder")
    parser.add_argument(
        "--against",
        metavar="DIR",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="other packages, onnxruntime-genai model folders (also run by onnxruntime-genai, if it is installed), or"
        " folders or files with one ONNX decoder",
    )
    parser.add_argument(
        "--lengths",
        metavar="LIST",
        type=_lengths,
        default="256,1024,2048",
        help="of the prompts, in tokens (default 256,1024,2048)",
    )
    parser.add_argument("--batch", metavar="N", type=positive, default=1, help="rows of a prompt (default 1)")
    parser.add_argument(
        "--decode-tokens", metavar="N", type=positive, default=32, help="greedy steps after every prompt (default 32)"
    )
    parser.add_argument("--repeats", metavar="N", type=positive, default=5, help="timed turns (default 5)")
    parser.add_argument("--threads", metavar="N", type=positive, help="of every subject (default: the machine's cores)")
    parser.add_argument("--provider", default="cpu", metavar="NAME", help="cpu (default) or cuda")
    parser.add_argument(
        "--runtime", default="popcompile", metavar="NAME", help="of packages: popcompile (default) or onnxruntime-genai"
    )
    parser.add_argument("--seed", metavar="N", type=count, default=0, help="of the prompts' tokens (default 0)")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--plot", metavar="FILE", type=Path, help="draw prefill times into a .svg or .png file")


def _lengths(text: str) -> list[int]:
    try:
        return [positive(part.strip()) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text} is not a list of numbers of at least 1, for example 256,1024"
        ) from None


def _bench(options: argparse.Namespace) -> None:
    from popcompile.bench import bench
    from popcompile.bench_report import bench_text
    from popcompile.plots import require_plot_path, write_prefill_plot
    from popcompile.progress import BENCH_STEPS, progress_bar

    if options.plot:
        require_plot_path(options.plot)
    names = ("against", "lengths", "batch", "decode_tokens", "repeats", "threads", "provider", "runtime", "seed")
    with progress_bar(BENCH_STEPS) as progress:
        result = bench(options.package, **{name: getattr(options, name) for name in names}, progress=progress)
    for warning in result["warnings"]:
        print(f"popcompile: {warning}", file=sys.stderr)
    print(json.dumps(result, indent=2) if options.json else bench_text(result))
    if options.plot:
        write_prefill_plot(options.plot, result)
