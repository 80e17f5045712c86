"""Who may import whom: arrows point one way, so that a folder can be read, and changed, without those above it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: what stands below every folder: names of libraries that are private, and silence for libraries
GROUND = {"popcompile.upstream", "popcompile.quiet"}
#: measuring what a package does needs no compiler
MEASURING = ("evaluation", "bench", "runtime", "generation", "verify", "encoder")


def imported(file: Path) -> set[str]:
    """Modules of popcompile that a file imports, anywhere in it; relative imports are of its own folder."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} if node.module != "popcompile" else {f"popcompile.{a.name}" for a in node.names}
    return {name for name in found if name.split(".")[0] == "popcompile"}


@pytest.mark.parametrize(
    ("folder", "below"), [("passes", ()), ("export", ("popcompile.passes",))], ids=lambda value: str(value)
)
def test_the_compiler_knows_nothing_of_the_driver(folder: str, below: tuple[str, ...]) -> None:
    for file in sorted((ROOT / folder).glob("*.py")):
        allowed = (*GROUND, f"popcompile.{folder}", *below)
        above = {name for name in imported(file) if not name.startswith(tuple(allowed))}
        assert not above, f"{file.relative_to(ROOT)} imports {above}"


def test_the_ground_stands_on_nothing() -> None:
    for name in GROUND:
        assert imported(ROOT / f"{name.replace('.', '/')}.py") <= GROUND


@pytest.mark.parametrize("module", MEASURING)
def test_measuring_needs_no_conversion(module: str) -> None:
    assert "popcompile.conversion" not in imported(ROOT / "popcompile" / f"{module}.py")
