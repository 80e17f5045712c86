"""Print tests/sweep/README.md from the results of a sweep: python tests/sweep/table.py FILE > tests/sweep/README.md"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("README.md")


def recorded() -> dict[str, str]:
    """Model type -> what the table says of its default config."""
    rows = [line.split("|") for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    return {row[1].strip().strip("`"): row[2].strip() for row in rows}


def main(file: str) -> None:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    by_type: dict[str, dict[str, dict[str, Any]]] = {}
    for result in map(json.loads, lines):
        model_type, _, variant = result["name"].partition(": ")
        by_type.setdefault(model_type, {})[variant] = result
    works = [t for t, results in by_type.items() if results["default"]["outcome"] == "works"]
    print(f"""# Every causal language model of transformers

`pytest -m sweep tests/test_sweep.py` converts a tiny model of each type of transformers' causal LM mapping, and of the
variants of its config, and compares it with transformers' own module: a whole prompt, a second one after it, a batch
that is padded on the left, and a pruned prefill, all within 1e-4 of the largest logit. This table was printed by
`python tests/sweep/table.py` with transformers {version("transformers")}:
{len(works)} of the {len(by_type)} types below work. A variant that is refused for the default config's reason stands
in no column.

| model type | default config | variants that work | refused variants |
|---|---|---|---|""")
    for model_type, results in sorted(by_type.items()):
        default = results.pop("default")
        fine = ", ".join(v for v, r in results.items() if r["outcome"] == "works")
        reasons = {v: _reason(r) for v, r in results.items() if r["outcome"] != "works"}
        refused = "; ".join(f"{v}: {reason}" for v, reason in reasons.items() if reason != _reason(default))
        print(f"| `{model_type}` | {_reason(default)} | {fine} | {refused} |")


def _reason(result: dict[str, Any]) -> str:
    """A result in a cell."""
    if result["outcome"] != "refused":
        return result["outcome"]
    by = "by its config" if result["where"] == "config" else "when it is converted"
    line = result["detail"].removeprefix("MODEL: ").partition("; ")[0].replace("|", "/")
    return f"refused {by}: {line}"


if __name__ == "__main__":
    main(sys.argv[1])
