"""Print passes/README.md's table of families from the results of their tests: python tests/support/family_table.py"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES

TESTS = {"prefill": "pruned prefill", "second_prompt": "after a past", "batch": "batch", "decode": "decode"}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.xml"
        tests = str(Path(__file__).parents[1] / "frontend" / "test_families.py")
        command = [sys.executable, "-m", "pytest", "-q", "-m", "slow or not slow", tests, f"--junitxml={file}"]
        subprocess.run(command, stdout=sys.stderr, check=False)
        cases = ElementTree.parse(file).getroot().iter("testcase")
        passed: dict[tuple[str, str], list[bool]] = defaultdict(list)
        for case in cases:
            test, _, parameters = case.attrib["name"].removeprefix("test_").partition("[")
            name = parameters.partition(": ")[0]
            passed[name, test].append(not list(case))
    rows = [
        [name, features, *("yes" if all(passed[name, test]) and passed[name, test] else "no" for test in TESTS)]
        for name, (features, _, _) in FAMILIES.items()
    ]
    print(tabulate(rows, ["family", "beyond Llama 2", *TESTS.values()], tablefmt="github"))


if __name__ == "__main__":
    main()
