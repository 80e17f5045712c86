"""The bounds of pyproject.toml: python .ci/bounds.py names | installed | newer | write [--keep "NAME ..."]

names       the dependencies without their bounds (those of --keep with them), for pip
installed   what is installed of them, beside their bounds
newer       what is installed and newer than its upper bound
write       move upper bounds to the next release after what is installed; a bound keeps its number of places
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def requirements(text: str) -> list[Requirement]:
    """Of the package and its extras, for this machine, but for the package itself."""
    project = tomllib.loads(text)["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    found = {str(r): r for r in map(Requirement, lines) if r.name != project["name"]}
    return [r for r in found.values() if r.marker is None or r.marker.evaluate()]


def upper(requirement: Requirement) -> str | None:
    return next((s.version for s in requirement.specifier if s.operator == "<"), None)


def installed(requirement: Requirement) -> Version | None:
    try:
        return Version(version(requirement.name))
    except PackageNotFoundError:
        return None


def after(bound: str, release: Version) -> str:
    """The next release after `release`, to as many places as the bound has: 1.24 after 1.23.2, 85 after 84.2.1."""
    places = [*release.release, 0, 0][: len(bound.split("."))]
    return ".".join(map(str, [*places[:-1], places[-1] + 1]))


def newer(text: str) -> Iterator[tuple[Requirement, str, Version]]:
    for requirement in requirements(text):
        bound, found = upper(requirement), installed(requirement)
        if bound is not None and found is not None and found >= Version(bound):
            yield requirement, bound, found


def moved(text: str, keep: set[str]) -> str:
    """The text of pyproject.toml with the bounds moved."""
    for requirement, bound, found in newer(text):
        if requirement.name not in keep:
            pattern = rf'("{re.escape(requirement.name)}>=[^",;]*,<){re.escape(bound)}(?=[";])'
            text, count = re.subn(pattern, rf"\g<1>{after(bound, found)}", text)
            assert count, f"{requirement} is spelled otherwise than NAME>=A,<B"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["names", "installed", "newer", "write"])
    parser.add_argument("--keep", default="", metavar="NAMES", help="dependencies whose bounds stay")
    options = parser.parse_args()
    text, keep = PYPROJECT.read_text(encoding="utf-8"), set(options.keep.split())
    if options.command == "names":
        wanted = {f"{r.name}{r.specifier if r.name in keep else ''}" for r in requirements(text)}
        print(*sorted(wanted), sep="\n")
    elif options.command == "installed":
        for requirement in requirements(text):
            if (found := installed(requirement)) is not None:
                print(f"{requirement.name} {found} ({requirement.specifier})")
    elif options.command == "newer":
        rows = [f"{r.name}: <{bound} -> {found}" for r, bound, found in newer(text)]
        print(*(rows or ["nothing is newer than its bound"]), sep="\n")
    elif (changed := moved(text, keep)) != text:
        PYPROJECT.write_text(changed, encoding="utf-8")
        print("pyproject.toml: upper bounds moved", file=sys.stderr)


if __name__ == "__main__":
    main()
