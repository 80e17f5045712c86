"""`popcompile inspect`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import json
from typing import Any

from popcompile.arguments import command, new_file, path
from popcompile.errors import PopcompileError
from popcompile.terminal import show


def add_inspect(commands: Any) -> None:
    parser = command(
        commands,
        "inspect",
        _inspect,
        "Show what every pass did to a package, how its layers were chosen, and what that costs.",
        "popcompile inspect out/ --html report.html",
    )
    parser.add_argument("package", metavar="OUT", type=path, help="package folder")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--html", metavar="FILE", type=new_file, help="write all of it into one page, with plots")
    parser.add_argument("--pass", dest="pass_name", metavar="NAME", help="print the graph before and after a pass")


def _inspect(options: argparse.Namespace) -> None:
    from popcompile.report.inspection import inspect_json, inspect_pass, inspect_text

    shown = {"--json": options.json, "--html": options.html is not None, "--pass": options.pass_name is not None}
    given = [name for name, is_given in shown.items() if is_given]
    if len(given) > 1:
        raise PopcompileError(f"{' and '.join(given)}: each shows the package in another way; give one of them")
    if options.json:
        show(json.dumps(inspect_json(options.package), indent=2))
    elif options.html is not None:
        from popcompile.report.page import write_html

        write_html(options.package, options.html)
        show(str(options.html))
    elif options.pass_name is not None:
        show(inspect_pass(options.package, options.pass_name))
    else:
        show(inspect_text(options.package))
