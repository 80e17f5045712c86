"""Time to encode a prompt, full against pruned, alternating in one run: medians, spread, and their ratio.

    python examples/prefill_time.py OUT --lengths 256,1024,2048 --repeat 7

The full prefill (decode.onnx) computes logits for every token. --unpruned OUT0, a package of the same model converted
with --prune 0, adds the whole model with one row of logits: what remains is the pruned layers' own share.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from pathlib import Path

import onnxruntime
import torch
from tabulate import tabulate

from popcompile.runtime import Runtime, Stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--unpruned", type=Path, metavar="OUT0")
    parser.add_argument("--lengths", default="256,1024,2048", help="prompt lengths in tokens")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--provider", default="cpu")
    options = parser.parse_args()
    runtime = Runtime(options.package, provider=options.provider)
    manifest = runtime.manifest
    paths: dict[str, tuple[Runtime, Stage]] = {"full": (runtime, "decode")}
    if options.unpruned:
        paths["full, one row of logits"] = (Runtime(options.unpruned, provider=options.provider), "prefill")
    paths["pop"] = (runtime, "prefill")
    print(
        f"{manifest.source['name']}, {len(manifest.pruned)} of {manifest.num_layers} layers pruned, {manifest.dtype},"
        f" {options.provider}; onnxruntime {onnxruntime.__version__}, {platform.processor() or platform.machine()}"
    )
    rows = []
    for length in (int(n) for n in options.lengths.split(",")):
        ids = torch.randint(manifest.vocab_size, (length,), generator=torch.Generator().manual_seed(length))
        seconds: dict[str, list[float]] = {name: [] for name in paths}
        for turn in range(options.repeat + 1):
            for name, (package, stage) in paths.items():
                cache = package.new_cache(1)
                started = time.perf_counter()
                package.feed([ids], cache, stage)
                if turn:  # the first turn warms up
                    seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
        spreads = {name: (max(values) - min(values)) * 1e3 for name, values in seconds.items()}
        cells = [
            f"{medians[name]:.0f} ± {spreads[name] / 2:.0f} ({medians[name] / medians['pop']:.2f}x)" for name in paths
        ]
        rows.append([length, *cells])
    print(tabulate(rows, headers=["tokens", *(f"{name}, ms" for name in paths)], disable_numparse=True))


if __name__ == "__main__":
    main()
