"""`popcompile serve`: its arguments, and what it prints."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from popcompile.arguments import COUNT, PORT, POSITIVE, command, path
from popcompile.errors import PopcompileError
from popcompile.terminal import show

#: what popcompile[serve] has
_LIBRARIES = ("fastapi", "openai", "pydantic", "starlette", "uvicorn")


def add_serve(commands: Any) -> None:
    parser = command(
        commands,
        "serve",
        _serve,
        "Answer requests over HTTP as OpenAI's API does: chat completions and completions, streamed or whole.",
        "popcompile serve out/ --port 8000",
    )
    parser.add_argument("package", metavar="OUT", type=path, help="package folder")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="address to listen at (default 127.0.0.1)"
    )
    parser.add_argument("--port", metavar="N", type=PORT, default=8000, help="default 8000; 0 for any that is free")
    parser.add_argument("--provider", default="cpu", metavar="NAME", help="cpu (default) or cuda")
    parser.add_argument("--threads", metavar="N", type=POSITIVE, help="threads of the model (default: the cores)")
    parser.add_argument(
        "--max-concurrent",
        metavar="N",
        type=POSITIVE,
        default=16,
        help="answers that are computed at once, of which a request with n asks for n; others wait (default 16)",
    )
    parser.add_argument(
        "--max-waiting",
        metavar="N",
        type=COUNT,
        default=256,
        help="requests that may wait beside as many as that; more get status 503 (default 256)",
    )
    parser.add_argument(
        "--prefix-cache-mb",
        metavar="N",
        type=COUNT,
        default=512,
        help="memory for keys and values of prompts' beginnings, which prompts that begin alike share; 0 keeps none"
        " (default 512)",
    )
    parser.add_argument(
        "--prefill-chunk",
        metavar="N",
        type=COUNT,
        default=1024,
        help="tokens of a prompt that are encoded at a time where there are other requests; 0 for all (default 1024)",
    )
    parser.add_argument(
        "--served-model-name", metavar="TEXT", help="what requests call the model (default: the folder's name)"
    )


def _serve(options: argparse.Namespace) -> None:
    from popcompile.runtime.providers import find_provider

    find_provider(options.provider)
    try:
        from popcompile.serving.server import serve
    except ModuleNotFoundError as error:
        if error.name in _LIBRARIES:
            raise PopcompileError(f'serve needs {error.name}; pip install "popcompile[serve]"') from error
        raise
    name = options.served_model_name or Path(os.path.abspath(options.package)).name
    serve(
        options.package,
        host=options.host,
        port=options.port,
        name=name,
        provider=options.provider,
        threads=options.threads,
        max_concurrent=options.max_concurrent,
        max_waiting=options.max_waiting,
        prefix_cache_bytes=options.prefix_cache_mb << 20,
        chunk=options.prefill_chunk,
        listening=lambda address: show(
            f"{name} at {address}; try: curl {address}/chat/completions -H 'Content-Type: application/json'"
            """ -d '{"messages": [{"role": "user", "content": "What is a B-tree?"}]}'"""
        ),
    )
