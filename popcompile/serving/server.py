"""`popcompile serve`: a package behind the API on one machine."""

from __future__ import annotations

import errno
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn

from popcompile.errors import PopcompileError
from popcompile.package.configs import load_tokenizer
from popcompile.runtime.generation import load
from popcompile.serving.app import create_app
from popcompile.serving.engine import Engine
from popcompile.serving.prefix_cache import PrefixCache
from popcompile.serving.prompts import Prompts
from popcompile.serving.scheduler import Scheduler

#: how long the steps under way, a long prompt's perhaps, may take after the server was told to end, in seconds
_GRACE = 30


class _Server(uvicorn.Server):
    """Answers that are under way end with an error when the server does."""

    def __init__(self, config: uvicorn.Config, scheduler: Scheduler) -> None:
        super().__init__(config)
        self._scheduler = scheduler
        self.is_interrupted = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._scheduler.end()
        self.is_interrupted |= sig == signal.SIGINT
        super().handle_exit(sig, frame)


def serve(
    folder: Path,
    *,
    host: str,
    port: int,
    name: str,
    provider: str,
    threads: int | None,
    max_concurrent: int,
    max_waiting: int,
    prefix_cache_bytes: int,
    chunk: int,
    listening: Callable[[str], None],
) -> None:
    """Answer requests until a signal ends it. max_waiting: requests beside those that are answered; more are refused.
    chunk: tokens of a prompt that are encoded at a time, 0 for all.
    listening: called with the API's address once it is open.

    Raises PopcompileError where the address is taken or the package does not load.
    """
    with _listen(host, port) as opened, load(folder, provider=provider, threads=threads) as model:
        prefixes = PrefixCache(prefix_cache_bytes) if prefix_cache_bytes else None
        tokenizer = load_tokenizer(folder, model.manifest)
        engine = Engine(model, tokenizer, max_concurrent=max_concurrent, prefixes=prefixes, chunk=chunk)
        app = create_app(name, Prompts(folder, model.manifest), engine, max_concurrent + max_waiting)
        config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=_GRACE)
        listening(f"http://{f'[{host}]' if ':' in host else host}:{opened.getsockname()[1]}/v1")
        server = _Server(config, engine.scheduler)
        try:
            server.run(sockets=[opened])
        finally:
            engine.scheduler.close()
        if server.is_interrupted:  # uvicorn has raised it already, unless a shell ignores it for processes behind `&`
            raise KeyboardInterrupt


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is open at once, so that a taken port is found before the package is loaded."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((str(address[0]), port), family=family)
    except socket.gaierror as error:
        raise PopcompileError(f"--host {host}: unknown ({error.strerror}); give an address of this machine") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PopcompileError(f"--port {port}: is in use; choose another, or end what listens there") from error
        if error.errno == errno.EADDRNOTAVAIL:
            raise PopcompileError(f"--host {host}: is no address of this machine; give one, or 0.0.0.0") from error
        raise PopcompileError(f"--port {port}: cannot be opened ({error.strerror}); choose another") from error
