"""The command line: `popcompile COMMAND`.

Exit status 0 on success, 2 for what the user got wrong (one line on stderr, cause and fix), 1 for a failure of ours,
130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP. Results go to stdout, progress to stderr and only on a terminal.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from popcompile.arguments import Parser
from popcompile.cli.analyze import add_analyze
from popcompile.cli.bench import add_bench
from popcompile.cli.convert import add_convert
from popcompile.cli.demo import add_demo
from popcompile.cli.evaluate import add_evaluate
from popcompile.cli.failures import output_failed, what_to_fix
from popcompile.cli.inspect import add_inspect
from popcompile.cli.run import add_run
from popcompile.cli.serve import add_serve
from popcompile.cli.signals import terminated
from popcompile.cli.verify import add_verify
from popcompile.errors import PopcompileError
from popcompile.loading import one_line
from popcompile.terminal import flush, open_streams, say, show


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    open_streams()
    _quiet_libraries()
    status = _run_command(arguments)
    failure = flush(sys.stdout)
    if failure and not isinstance(failure, BrokenPipeError) and status == 0:
        status = 2
        say(f"popcompile: error: {output_failed(failure)}")
    flush(sys.stderr)
    return status


def _run_command(arguments: Sequence[str] | None) -> int:
    options = argparse.Namespace()
    try:
        with terminated():
            given = sys.argv[1:] if arguments is None else list(arguments)
            options = _parser().parse_args(given or ["--help"])
            _require_current_folder()
            return options.command(options) or 0
    except SystemExit as end:  # argparse's, or a signal's
        return int(end.code or 0)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0  # the reader has left
    except Exception as error:
        if os.environ.get("POPCOMPILE_DEBUG") and not isinstance(error, PopcompileError):
            raise
        names = [str(value) for value in vars(options).values() if isinstance(value, str | Path)]
        if (message := what_to_fix(error, names)) is not None:
            say(f"popcompile: error: {message}")
            return 2
        reason = f"{type(error).__name__}: {one_line(error, 400)}"
        say(f"popcompile: internal error: {reason}; a bug of popcompile, POPCOMPILE_DEBUG=1 shows where")
        return 1


def _require_current_folder() -> None:
    """Libraries crash without one."""
    try:
        os.getcwd()
    except OSError as error:
        raise PopcompileError(
            f"the current folder cannot be found ({error.strerror}); it was removed, or this user may not enter it:"
            " change to another"
        ) from error


def _quiet_libraries() -> None:
    """Their warnings are not about what the user does. `python -W` and TRANSFORMERS_VERBOSITY bring them back.

    ONNX Runtime, from 1.29 on, would write an identifier into the home folder, report uses of it to its maker, and log
    where it cannot.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


class _Version(argparse.Action):
    """Reads the version where it is asked for: that takes as long as all the rest of the help."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from popcompile import __version__

        show(f"popcompile {__version__}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="popcompile",
        description="Compile a Hugging Face decoder into an ONNX Runtime package whose prefill skips the layers that"
        " prompts do not need.",
    )
    parser.add_argument("--version", action=_Version, help="print popcompile's version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=Parser)
    add_convert(commands)
    add_analyze(commands)
    add_run(commands)
    add_serve(commands)
    add_inspect(commands)
    add_verify(commands)
    add_evaluate(commands)
    add_bench(commands)
    add_demo(commands)
    return parser
