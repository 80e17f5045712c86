"""A process that holds one subject of a benchmark and waits to be asked: `python -m popcompile.bench_worker`.

Requests and replies are JSON, a line each, on stdin and stdout. What libraries print on stdout goes to stderr.

    {"load": subject, "provider", "threads"}      -> {"seconds", "anonymous"}                        (bytes)
    {"turn": ids, "steps"}                        -> {"prefill", "time_to_first_token", "decode"}    (seconds)
    {"warm_up": ids, "steps"}                     -> {"first_token", "anonymous", "peak"}
    whatever fails                                -> {"error": one line, "mendable": whether it says how}
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from typing import Any

from popcompile.bench_runners import Runner, open_runner
from popcompile.errors import PopcompileError
from popcompile.resident import AnonymousPeak, anonymous_bytes, peak_bytes


def main() -> None:
    """Answer until stdin ends, as it does when the parent process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = _Worker()
    for line in sys.stdin:
        try:
            reply = worker.answer(json.loads(line))
        except PopcompileError as error:
            reply = {"error": str(error), "mendable": True}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}", "mendable": False}
        print(json.dumps(reply), file=replies, flush=True)


class _Worker:
    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "load" in request:
            return self._load(request)
        if "warm_up" in request:
            return self._warm_up(request["warm_up"], request["steps"])
        return self._turn(request["turn"], request["steps"])

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        started = time.perf_counter()
        self._runner: Runner = open_runner(request["load"], request["provider"], request["threads"])
        return {"seconds": time.perf_counter() - started, "anonymous": anonymous_bytes()}

    def _warm_up(self, ids: list[list[int]], steps: int) -> dict[str, Any]:
        """A turn whose time does not count; its memory does."""
        runner, prompt = self._runner, self._runner.encode(ids)
        with AnonymousPeak() as anonymous:
            runner.begin(prompt, steps)
            runner.prefill(prompt)
            first = runner.likeliest()
            runner.pick()
            for _ in range(steps):
                runner.step()
            runner.end()
        return {"first_token": first, "anonymous": anonymous.bytes, "peak": peak_bytes()}

    def _turn(self, ids: list[list[int]], steps: int) -> dict[str, float]:
        runner, prompt = self._runner, self._runner.encode(ids)
        gc.collect()
        began = time.perf_counter()
        runner.begin(prompt, steps)
        given = time.perf_counter()
        runner.prefill(prompt)
        encoded = time.perf_counter()
        runner.pick()
        picked = time.perf_counter()
        for _ in range(steps):
            runner.step()
        done = time.perf_counter()
        runner.end()
        return {"prefill": encoded - given, "time_to_first_token": picked - began, "decode": done - picked}


if __name__ == "__main__":
    main()
