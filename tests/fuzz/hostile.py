"""Damage to JSON and to bytes: values that no field expects, and structure that no reader expects."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

HUGE = 10**12
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2, 7, 2**31, 2**40, 2**63, 2**64, HUGE, 10**9, -(2**63), 0.5, -0.0, 1e308,
    float("nan"), float("inf"), float("-inf"), "", "x", "0", "1", "-1", "true", "a" * 5000, "\x00", "\ud800",
    "\x1b[31mred\x07", "../../outside/secret", "/dev/zero", "a/b", "~", "\n", "é" * 300, [], [1], [None], [[]], [0] * 5,
    ["x"], [True], {}, {"a": 1}, {"": None}, {"type": "x"}, [{}], [1, "2", None],
]  # fmt: skip


def near(value: Any, rng: Random) -> Any:
    """A value like this one that is wrong by a little."""
    if isinstance(value, bool):
        return rng.choice([not value, int(value), str(value).lower()])
    if isinstance(value, int):
        return rng.choice([value + 1, value - 1, value * 2, -value, float(value), value + 0.5, str(value), [value]])
    if isinstance(value, float):
        return rng.choice([value * 1e6, -value, str(value), [value], int(value)])
    if isinstance(value, str):
        return rng.choice([value + "x", value.upper(), value[:-1], [value], {"x": value}, value + "\x00", 1])
    if isinstance(value, list):
        return rng.choice(
            [value * 2, value[:-1], [*value, None], {str(i): v for i, v in enumerate(value)}, value[::-1]]
        )
    if isinstance(value, dict):
        return rng.choice([list(value), list(value.values()), {**value, "x": 1}, {}, str(value)])
    return rng.choice([0, "", []])


def paths(document: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value in a JSON document."""
    found = [prefix]
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        found += paths(value, (*prefix, key))
    return found


def at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def short(value: Any, limit: int = 60) -> str:
    text = ascii(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}... ({len(text)} characters)"


def damage(document: Any, rng: Random, focus: list[tuple[Any, ...]] | None = None) -> tuple[Any, str, str]:
    """A damaged copy of a document, what was done, and the first key on the way to it.

    focus: paths to prefer; those that the document lacks are added.
    """
    document = copy.deepcopy(document)
    if focus and rng.random() < 0.7:
        path = rng.choice(focus)
    else:
        some = paths(document)[1:] or [()]
        shallow = [path for path in some if len(path) <= 2]
        path = rng.choice(rng.choice([shallow, some]))
    if not path:
        value = rng.choice(VALUES)
        return value, f"the document is {short(value)}", ""
    parent = document
    for key in path[:-1]:
        if isinstance(parent, dict) and not isinstance(parent.get(key), dict | list):
            parent[key] = {}
        parent = parent[key]
    key, where = path[-1], ".".join(map(str, path))
    absent = isinstance(parent, dict) and key not in parent
    how = rng.choice(["value"] * 5 + ["near"] * 3 + ["delete", "rename", "add", "swap"])
    if absent or how == "value":
        parent[key] = rng.choice(VALUES)
        return document, f"{where} = {short(parent[key])}", str(path[0])
    if how == "near":
        parent[key] = near(parent[key], rng)
        return document, f"{where} = {short(parent[key])}", str(path[0])
    if how == "delete":
        del parent[key]
        return document, f"{where} is deleted", str(path[0])
    if how == "swap":
        other = rng.choice(paths(document)[1:])
        parent[key] = copy.deepcopy(at(document, other))
        return document, f"{where} = that of {'.'.join(map(str, other))}", str(path[0])
    value = rng.choice(VALUES)
    if isinstance(parent, list):
        parent.insert(rng.randint(0, len(parent)), value)
        return document, f"{short(value)} is put into {'.'.join(map(str, path[:-1]))}", str(path[0])
    if how == "rename":
        name = rng.choice(["", "\x00", "\x1b[2J", "a" * 5000, str(key) + "_", str(key).upper(), "../x"])
        parent[name] = parent.pop(key)
        return document, f"{where} is called {short(name)}", str(path[0])
    name = rng.choice(["", "x", "\x1b[2J", "__class__", "__init__", "auto_map", "self", "to_dict", "_", "name_or_path"])
    parent[name] = value
    return document, f"{'.'.join(map(str, (*path[:-1], name)))} = {short(value)} is added", str(path[0])


def dumps(document: Any) -> bytes:
    """As a hand would write it: NaN and surrogates as they are."""
    return json.dumps(document, indent=2).encode("utf-8", "surrogatepass")


def damage_text(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Damage to a text file as bytes."""
    how = rng.randrange(13)
    cut = rng.randrange(len(content) + 1)
    deep = 200_000
    return [
        lambda: (content[:cut], f"cut to {cut} bytes"),
        lambda: (b"", "empty"),
        lambda: flip(content, rng),
        lambda: (b"\xef\xbb\xbf" + content, "a byte order mark before it"),
        lambda: (content.decode("utf-8", "replace").encode("utf-16"), "in UTF-16"),
        lambda: (content + b"x", "an x behind it"),
        lambda: (b"[" * deep, f"{deep} brackets"),
        lambda: (b'{"a":' * deep + b"1" + b"}" * deep, f"{deep} objects in each other"),
        lambda: (content.replace(b"{", b'{"a": ' + b"9" * 6000 + b",", 1), "a number of 6000 digits"),
        lambda: (
            content[:cut] + bytes(rng.randrange(256) for _ in range(8)) + content[cut:],
            f"8 bytes put in at {cut}",
        ),
        lambda: (content[:cut] + b"\x00" + content[cut:], f"a NUL at {cut}"),
        lambda: (content * 2, "twice"),
        lambda: (b"\n" * 1000 + content.replace(b"\n", b"\r\n"), "empty lines before it, CRLF"),
    ][how]()


def flip(content: bytes, rng: Random, most: int = 8) -> tuple[bytes, str]:
    """Some flipped bits."""
    if not content:
        return b"\x00", "one zero byte"
    damaged, count = bytearray(content), rng.randint(1, most)
    places = sorted(rng.randrange(len(content)) for _ in range(count))
    for place in places:
        damaged[place] ^= 1 << rng.randrange(8)
    return bytes(damaged), f"bits flipped at {', '.join(map(str, places))}"


def damage_bytes(content: bytes, rng: Random) -> tuple[bytes, str]:
    """Damage to a binary file."""
    how, cut = rng.randrange(6), rng.randrange(len(content) + 1)
    if how == 0:
        return content[:cut], f"cut to {cut} bytes"
    if how == 1:
        size = rng.choice([1, 8, 64])
        return content[:cut] + content[cut + size :], f"{size} bytes taken out at {cut}"
    if how == 2:
        size = rng.choice([1, 8, 64])
        return content[:cut] + rng.randbytes(size) + content[cut:], f"{size} bytes put in at {cut}"
    if how == 3:
        filled = rng.choice([b"\x00", b"\xff"])
        return content[:cut] + filled * 64 + content[cut + 64 :], f"64 bytes of {filled!r} at {cut}"
    return flip(content, rng)
