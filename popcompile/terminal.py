"""What reaches the terminal: names and messages that others wrote, and standard streams that may be closed or full."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import unicodedata
from typing import TextIO

#: control characters, formatting ones (bidirectional overrides, zero width), lone surrogates, line and paragraph
#: separators
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_SUSPECT = re.compile(r"[^\x20-\x7e]")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str, keep: str = "") -> str:
    r"""`text` with every character that a terminal may obey or not show as a Python escape: \x1b, \u202e, \udcff.

    A name in a package, a checkpoint or a path is anyone's choice. keep: characters to leave as they are.
    """
    return _SUSPECT.sub(lambda match: match[0] if match[0] in keep else _escaped(match[0]), text)


def one_printable_line(text: str) -> str:
    """`text` on one line, as `printable` shows it."""
    return printable(re.sub(r"[ \t\r\n\f\v]+", " ", text).strip(" "))


def without_controls(text: str) -> str:
    """A model's answer with its control characters escaped, but for line ends and tabs; joiners and marks of writing
    direction, which languages need, stay.
    """
    return _CONTROLS.sub(lambda match: _escaped(match[0]), text)


def _escaped(character: str) -> str:
    return ascii(character)[1:-1] if unicodedata.category(character) in _UNSAFE else character


def show(text: str) -> None:
    """Print a report, of many lines perhaps, on stdout."""
    print(printable(text, keep="\n\t"), flush=True)


def say(text: str) -> None:
    """Print one line on stderr. Where that fails, nobody reads it, and the command goes on."""
    with contextlib.suppress(OSError, ValueError):
        print(one_printable_line(text), file=sys.stderr, flush=True)


# --- standard streams ------------------------------------------------------------------------------------------


def open_streams() -> None:
    """Make the standard streams fit for use: a closed one (`<&-`, `>&-`) becomes the null device, so that no file that
    is opened later gets its number and what libraries print; characters that an encoding lacks are escaped.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor == number:
                os.set_inheritable(descriptor, True)  # as standard streams are
            setattr(sys, name, os.fdopen(descriptor, "w" if number else "r", encoding="utf-8"))
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def flush(stream: TextIO) -> OSError | None:
    """Write out what a stream holds. Where that fails the rest is thrown away, or the interpreter would try once more
    when it exits, and change the exit status; returns why it failed.
    """
    try:
        stream.flush()
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
            stream.flush()
        return error
    return None
