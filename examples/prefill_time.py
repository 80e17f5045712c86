"""Time to encode a prompt, full against pruned, alternating in one run: medians, spread, and their ratio.

    python examples/prefill_time.py OUT --lengths 256,1024,2048 --repeat 7
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

STAGES: dict[str, Stage] = {"full": "decode", "pop": "prefill"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--lengths", default="256,1024,2048", help="prompt lengths in tokens")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--provider", default="cpu")
    options = parser.parse_args()
    runtime = Runtime(options.package, provider=options.provider)
    manifest = runtime.manifest
    print(
        f"{manifest.source['name']}, {len(manifest.pruned)} of {manifest.num_layers} layers pruned, {manifest.dtype},"
        f" {options.provider}; onnxruntime {onnxruntime.__version__}, {platform.processor() or platform.machine()}"
    )
    rows = []
    for length in (int(n) for n in options.lengths.split(",")):
        ids = torch.randint(manifest.vocab_size, (length,), generator=torch.Generator().manual_seed(length))
        seconds: dict[str, list[float]] = {name: [] for name in STAGES}
        for turn in range(options.repeat + 1):
            for name, stage in STAGES.items():
                cache = runtime.new_cache(1)
                started = time.perf_counter()
                runtime.feed([ids], cache, stage)
                if turn:  # the first turn warms up
                    seconds[name].append(time.perf_counter() - started)
        medians = {name: statistics.median(values) * 1e3 for name, values in seconds.items()}
        spreads = {name: (max(values) - min(values)) * 1e3 for name, values in seconds.items()}
        cells = [f"{medians[name]:.0f} ± {spreads[name] / 2:.0f}" for name in STAGES]
        rows.append([length, *cells, f"{medians['full'] / medians['pop']:.2f}x"])
    print(tabulate(rows, headers=["tokens", "full, ms", "pop, ms", "ratio"], disable_numparse=True))


if __name__ == "__main__":
    main()
