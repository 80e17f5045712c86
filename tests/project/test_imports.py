"""Who may import whom: arrows point one way, so that a folder can be read, and changed, without those above it."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: what a folder may import: other folders, and files that lie beside them
ARROWS: dict[str, set[str]] = {
    "passes": set(),
    "export": {"passes"},
    "text": set(),
    "package": {"export"},
    "frontend": {"passes"},
    "vision": {"passes", "frontend", "package"},
    "runtime": {"export", "package", "text"},
    "serving": {"package", "runtime"},
    "evaluation": {"package", "runtime", "text", "variants"},
    "bench": {"export", "package", "runtime", "variants"},
    "pruning": {"passes", "frontend", "package", "text", "evaluation", "runtime", "vision"},
    "report": {"package"},
    "variants": {"passes", "export", "frontend", "package", "target", "vision"},
    "target": {"passes", "export"},
    "packaging": {"passes", "export", "frontend", "package", "pruning", "target", "vision"},
    "conversion": {"passes", "export", "frontend", "package", "packaging", "pruning", "target", "vision"},
    "cli": {
        "bench",
        "conversion",
        "evaluation",
        "frontend",
        "package",
        "pruning",
        "report",
        "runtime",
        "serving",
        "text",
    },
}
#: files below every folder, which import one another only; the compiler, passes and export, stands on two of them
GROUND = {
    "arguments", "config_schema", "errors", "files", "loading", "progress", "quiet", "rope", "terminal",
    "upstream",
}  # fmt: skip
COMPILERS_GROUND = {"quiet", "upstream"}


def files_of(name: str) -> list[Path]:
    """Of a folder or a file of popcompile."""
    places = [ROOT / name, ROOT / "popcompile" / name]
    return [f for p in places for f in sorted(p.glob("*.py"))] or [ROOT / "popcompile" / f"{name}.py"]


def imported(file: Path) -> set[str]:
    """Folders and files of popcompile that a file imports, anywhere in it; relative imports are of its own folder."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found |= {node.module} if node.module != "popcompile" else {f"popcompile.{a.name}" for a in node.names}
    parts = [name.split(".") for name in found]
    return {name[1] for name in parts if name[0] == "popcompile" and len(name) > 1 and name[1] != "__version__"}


@pytest.mark.parametrize("name", [*ARROWS, *sorted(GROUND)])
def test_arrows(name: str) -> None:
    allowed = GROUND | ARROWS.get(name, set()) | {name}
    if name in ("passes", "export"):
        allowed -= GROUND - COMPILERS_GROUND
    for file in files_of(name):
        assert imported(file) <= allowed, f"{file.relative_to(ROOT)} imports {imported(file) - allowed}"


def test_arrows_point_one_way() -> None:
    list(TopologicalSorter(ARROWS).static_order())  # raises where there is a circle


def test_every_file_has_its_arrows() -> None:
    """And every folder is installed: pyproject.toml lists them."""
    modules = {path.stem for path in (ROOT / "popcompile").glob("*.py")} - {"__init__", "__main__"}
    folders = {path.parent.name for path in (ROOT / "popcompile").glob("*/__init__.py")} | {"passes", "export"}
    assert modules | folders == GROUND | set(ARROWS)
    listed = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"popcompile.{folder}",' in listed for folder in folders)
