"""`popcompile verify`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
from typing import Any

from popcompile.arguments import command, path
from popcompile.terminal import show


def add_verify(commands: Any) -> None:
    parser = command(
        commands,
        "verify",
        _verify,
        "Check a package: hashes, graphs, and prefill against decode in numbers.",
        "popcompile verify out/",
    )
    parser.add_argument("package", metavar="OUT", type=path, help="package folder")
    parser.add_argument("--provider", default="cpu", metavar="NAME", help="cpu (default) or cuda")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")


def _verify(options: argparse.Namespace) -> None:
    from popcompile.runtime.providers import find_provider
    from popcompile.runtime.verify import verify

    find_provider(options.provider)  # options are checked before the package
    checks = verify(options.package, provider=options.provider)
    if options.json:
        show(json.dumps({"package": str(options.package), "checks": checks}, indent=2))
    else:
        show("\n".join(f"ok  {check['check']}: {check['detail']}" for check in checks))
