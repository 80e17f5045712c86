"""`popcompile bench`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
from typing import Any

from popcompile.arguments import POSITIVE, SEED, command, name, new_file, numbers, path
from popcompile.terminal import say, show


def add_bench(commands: Any) -> None:
    parser = command(
        commands,
        "bench",
        _bench,
        "Measure time to first token, decoding speed and memory: pruned against full prefill, and against other tools.",
        "popcompile bench out/ --against genai-model/ --plot prefill.svg",
    )
    parser.add_argument("package", metavar="OUT", type=path, help="package folder")
    parser.add_argument(
        "--against",
        metavar="DIR",
        type=path,
        nargs="+",
        action="extend",
        default=[],
        help="other packages, onnxruntime-genai model folders (also run by onnxruntime-genai, if it is installed),"
        " folders or files with one ONNX decoder, or checkpoints, which transformers runs",
    )
    parser.add_argument(
        "--lengths",
        metavar="LIST",
        type=numbers,
        default="256,1024,2048",
        help="prompt lengths in tokens (default 256,1024,2048)",
    )
    parser.add_argument(
        "--image",
        dest="images",
        type=name,
        metavar="FILE",
        action="append",
        default=[],
        help="a picture of whose size an image stands in every prompt beside its text, of a vision-language model; as"
        " often as there are images",
    )
    parser.add_argument(
        "--image-tokens",
        metavar="LIST",
        type=numbers,
        default=[],
        help="images of so many tokens each, in place of pictures, for example 256,256",
    )
    parser.add_argument("--batch", metavar="N", type=POSITIVE, default=1, help="prompts per batch (default 1)")
    parser.add_argument(
        "--decode-tokens", metavar="N", type=POSITIVE, default=32, help="greedy steps after every prompt (default 32)"
    )
    parser.add_argument("--repeats", metavar="N", type=POSITIVE, default=5, help="timed turns (default 5)")
    parser.add_argument(
        "--threads", metavar="N", type=POSITIVE, help="threads per subject (default: the machine's cores)"
    )
    parser.add_argument("--provider", default="cpu", metavar="NAME", help="cpu (default) or cuda")
    parser.add_argument(
        "--runtime",
        default="popcompile",
        metavar="NAME",
        help="runtime for packages: popcompile (default) or onnxruntime-genai",
    )
    parser.add_argument("--seed", metavar="N", type=SEED, default=0, help="seed of the random prompts (default 0)")
    parser.add_argument("--save", action="store_true", help="put the result into OUT/report.json too")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--plot", metavar="FILE", type=new_file, help="draw prefill times into a .svg or .png file")


def _bench(options: argparse.Namespace) -> None:
    from popcompile.bench.measure import bench
    from popcompile.package.manifest import read_manifest
    from popcompile.package.saving import require_saveable, save_in_report
    from popcompile.progress import BENCH_STEPS, progress_bar
    from popcompile.report.bench import bench_text
    from popcompile.report.plots import require_plot_path, write_prefill_plot

    if options.plot:
        require_plot_path(options.plot)
    manifest = None
    if options.save:
        require_saveable(options.package)
        manifest = read_manifest(options.package)
    names = ["against", "lengths", "batch", "decode_tokens", "repeats", "threads", "provider", "runtime", "seed"]
    names += ["images", "image_tokens"]
    with progress_bar(BENCH_STEPS) as progress:
        result = bench(options.package, **{name: getattr(options, name) for name in names}, progress=progress)
    for warning in result["warnings"]:
        say(f"popcompile: {warning}")
    if manifest is not None:
        key = "benchmark_images" if result["settings"]["images"] else "benchmark"
        save_in_report(options.package, manifest, key, result)
    show(json.dumps(result, indent=2) if options.json else bench_text(result))
    if options.plot:
        write_prefill_plot(options.plot, result)
