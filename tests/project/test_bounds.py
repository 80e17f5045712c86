"""pyproject.toml: every dependency has both bounds, every import is a dependency, and .ci/bounds.py moves bounds."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
LINES = [*PROJECT["dependencies"], *(line for extra in EXTRAS.values() for line in extra)]
BOUNDED = [r for r in map(Requirement, LINES) if r.name != "popcompile"]
#: what one of two packages brings, by the machine
ALIASES = {"onnxruntime-gpu": "onnxruntime", "onnxruntime-genai-cuda": "onnxruntime-genai"}


@pytest.mark.parametrize("requirement", BOUNDED, ids=lambda r: r.name)
def test_both_bounds(requirement: Requirement) -> None:
    operators = {s.operator for s in requirement.specifier}
    assert operators == {">=", "<"}, f"{requirement}: write NAME>=OLDEST,<NEXT (.ci/README.md)"
    low, high = sorted(Version(s.version) for s in requirement.specifier)
    assert low < high


def test_optimum_is_bounded_too() -> None:
    """In an environment of its own, which examples/clients/check.py makes."""
    tree = ast.parse((ROOT / "examples" / "clients" / "check.py").read_text())
    made = next(n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "OPTIMUM")
    for line in ast.literal_eval(made.value):
        assert {s.operator for s in Requirement(line).specifier} == {">=", "<"}, line


def test_the_builds_of_onnxruntime_have_one_range() -> None:
    """Both that pip chooses from, and the one that popcompile/README.md swaps in."""
    ranges = {str(r.specifier) for r in BOUNDED if r.name in ("onnxruntime", "onnxruntime-gpu")}
    shown = re.search(r'pip install "onnxruntime(.+?)"', (ROOT / "popcompile/README.md").read_text(encoding="utf-8"))
    assert shown and {str(SpecifierSet(shown[1]))} == ranges


def test_every_import_is_a_dependency() -> None:
    """Of the package, wherever it stands in a file; a dependency's dependency may change."""
    imported = set()
    for path in (p for folder in ("popcompile", "passes", "export") for p in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.partition(".")[0])
    imported -= {*sys.stdlib_module_names, "popcompile"}
    declared = {canonicalize_name(r.name) for r in BOUNDED}
    declared |= {ALIASES[name] for name in declared & ALIASES.keys()}
    packages = packages_distributions()
    missing = {
        module for module in imported if not declared & {canonicalize_name(p) for p in packages.get(module, [module])}
    }
    assert not missing, "import them from what is declared, or declare them in pyproject.toml"


def test_bounds_move(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("bounds", ROOT / ".ci" / "bounds.py")
    assert spec is not None and spec.loader is not None
    bounds = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bounds)
    text = (
        '[project]\nname = "p"\ndependencies = ["a>=1,<2.5", "b>=0.4.9,<0.4.14; python_version > \'3\'", "c>=7,<85",'
        ' "d>=1,<9.9", "e>=1,<2"]\noptional-dependencies = { x = ["p[y]"], y = [] }\n'
    )
    found = {"a": "2.6.3", "b": "0.4.15", "c": "86.2.1", "d": "9.8", "e": "3.0"}
    monkeypatch.setattr(bounds, "installed", lambda r: Version(found[r.name]))
    assert [r.name for r, _, _ in bounds.newer(text)] == ["a", "b", "c", "e"]
    expected = text.replace("<2.5", "<2.7").replace("<0.4.14", "<0.4.16").replace("<85", "<87")
    assert bounds.moved(text, {"e"}) == expected
    assert tomllib.loads(expected)
