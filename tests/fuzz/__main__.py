"""`python -m fuzz` (in tests/): run cases by seed, print counts and every violation (README.md)."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from forks import NO_THREADS, prepare

if TYPE_CHECKING:
    from fuzz.runner import Outcome

os.environ |= NO_THREADS | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first case (default 0)")
    parser.add_argument("--count", type=int, default=200, help="of cases (default 200)")
    parser.add_argument(
        "--kind", action="append", help="package, graph, config, checkpoint, adapter, gguf or place; all by default"
    )
    parser.add_argument(
        "--jobs", type=int, default=len(os.sched_getaffinity(0)), help="cases at a time (default: cores)"
    )
    parser.add_argument("--bases", type=Path, help="a folder for the undamaged inputs, made if it is not there")
    parser.add_argument(
        "--package", type=Path, help="a package of the model in tests/support/bad_input.py, to save time"
    )
    parser.add_argument("--packages", default="split,unified,int4", help="which packages are made (default: all three)")
    parser.add_argument("--quick", action="store_true", help="few cases whose command traces a model")
    parser.add_argument("--keep", type=Path, help="a folder to keep every case in; with it each command is printed")
    parser.add_argument("--json", type=Path, help="write outcomes into a file")
    parser.add_argument("--only", help="cases as KIND:SEED,KIND:SEED in place of --seed and --count")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory(prefix="popcompile-fuzz-") as temporary:
        os.chmod(temporary, 0o755)
        os.environ |= {"HF_HOME": f"{temporary}/hf", "TMPDIR": temporary, "XDG_CACHE_HOME": f"{temporary}/cache",
                       "TORCHINDUCTOR_CACHE_DIR": f"{temporary}/inductor"}  # fmt: skip
        return _run(options, Path(temporary))


def _run(options: argparse.Namespace, temporary: Path) -> int:
    from fuzz.bases import make_bases
    from fuzz.runner import KINDS, USED, apart, run

    started = time.monotonic()
    prepare(USED)
    bases = options.bases or temporary / "bases"
    if not (bases / "logits.npz").is_file():
        bases.mkdir(parents=True, exist_ok=True)
        apart(lambda: make_bases(bases, options.packages.split(","), options.package))
    place = options.keep or temporary / "cases"
    place.mkdir(parents=True, exist_ok=True)
    ready = time.monotonic()
    kinds = options.kind or list(KINDS)
    cases: Iterator[tuple[str, int]] = ((kinds[seed % len(kinds)], seed) for seed in itertools.count(options.seed))
    count = options.count
    if options.only:
        named = [(kind, int(seed)) for kind, seed in (one.split(":") for one in options.only.split(","))]
        cases, count = iter(named), len(named)
    outcomes, violations = [], 0
    for outcome in run(cases, count, bases, place, options.jobs, keep=options.keep is not None, quick=options.quick):
        outcomes.append(outcome)
        if options.keep:
            print(
                f"{outcome.kind} {outcome.seed}: {outcome.outcome}, {outcome.seconds:.1f} s: {json.dumps(outcome.case)}"
            )
        if outcome.wrong:
            violations += 1
            print(_told(outcome), flush=True)
    seconds = time.monotonic() - ready
    if not options.only:
        print(f"\nseeds {options.seed} to {max(o.seed for o in outcomes)}")
    for kind in KINDS:
        of_kind = [o for o in outcomes if o.kind == kind]
        if of_kind:
            counts = Counter(o.outcome for o in of_kind)
            said = ", ".join(f"{n} {word}" for word, n in sorted(counts.items()))
            bad = sum(bool(o.wrong) for o in of_kind)
            print(f"  {kind:<11} {len(of_kind):>5} cases: {said}; {bad} violations")
    print(f"{len(outcomes)} cases, {violations} violations; {seconds:.0f} s and {ready - started:.0f} s before them")
    if options.json:
        options.json.write_text(json.dumps([vars(o) for o in outcomes]))
    return 1 if violations else 0


def _told(outcome: Outcome) -> str:
    """A violation: how to run it again, the damage, and what was said."""
    words = " ".join(part if part.isascii() and part.isprintable() else ascii(part) for part in outcome.case["command"])
    return (
        f"\nVIOLATION --only {outcome.kind}:{outcome.seed}  {'; '.join(outcome.wrong)}\n"
        f"  damage:  {outcome.case['words']}\n"
        f"  command: popcompile {words[:300]}\n"
        f"  {outcome.outcome} after {outcome.seconds:.1f} s, {outcome.growth / 1e6:.0f} MB more;"
        f" stderr: {outcome.stderr[:600]!a}"
    )


if __name__ == "__main__":
    sys.exit(main())
