"""`popcompile demo`: its arguments; demonstration.py is what it does."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from popcompile.arguments import command, path


def add_demo(commands: Any) -> None:
    parser = command(
        commands,
        "demo",
        _demo,
        "Convert SmolLM2-135M-Instruct, inspect it, and answer a long prompt with full and pruned prefill.",
        "popcompile demo",
    )
    parser.add_argument("--out", metavar="OUT", type=path, default=Path("popcompile-demo"), help="package folder")


def _demo(options: argparse.Namespace) -> None:
    from popcompile.cli.demonstration import demo

    demo(options.out)
