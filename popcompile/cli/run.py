"""`popcompile run`: its arguments."""

from __future__ import annotations

import argparse
from typing import Any

from popcompile.arguments import POSITIVE, SEED, TEMPERATURE, command, name, path


def add_run(commands: Any) -> None:
    parser = command(
        commands,
        "run",
        _run,
        "Answer a prompt, streaming, and print time to first token and tokens/s.",
        'popcompile run out/ --prompt "What is a B-tree?"',
    )
    parser.add_argument("package", metavar="OUT", type=path, help="package folder")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="the prompt; a chat template is applied where there is one")
    what.add_argument("--prompt-file", metavar="FILE", type=path, help="a UTF-8 file with the prompt")
    what.add_argument(
        "--chat",
        action="store_true",
        help="talk, a message a line, until end of input; a message that cannot be answered is refused in one line, and"
        " the chat goes on (exit status 2 at its end)",
    )
    parser.add_argument(
        "--image",
        metavar="FILE",
        type=name,
        action="append",
        default=[],
        help="a picture that the prompt is about, of a vision-language model; as often as there are pictures (in a chat"
        " also a line /image FILE)",
    )
    parser.add_argument("--raw", action="store_true", help="do not apply the chat template")
    _add_session_options(parser)
    parser.add_argument("--max-new-tokens", metavar="N", type=POSITIVE, default=128, help="default 128")
    parser.add_argument("--sample", action="store_true", help="sample instead of taking the most likely token")
    parser.add_argument("--temperature", metavar="T", type=TEMPERATURE, default=0.7, help="default 0.7")
    parser.add_argument("--seed", metavar="N", type=SEED, default=0, help="with --sample (default 0)")


def _add_session_options(parser: Any) -> None:
    parser.add_argument("--prefill", default="auto", metavar="HOW", help="auto (default), pop or full")
    parser.add_argument("--provider", default="cpu", metavar="NAME", help="cpu (default) or cuda")


def _run(options: argparse.Namespace) -> int:
    from popcompile.runtime.chat import answer, chat

    if options.chat:
        return chat(options.package, options)
    answer(options.package, options)
    return 0
