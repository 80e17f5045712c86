"""A process that holds one subject of a benchmark and waits to be asked: `python -m popcompile.bench.worker`.

Requests and replies are JSON, a line each, on stdin and stdout. What libraries print on stdout goes to stderr.

    {"load": subject, "provider", "threads", "images": sizes}   -> {"seconds", "anonymous", "gpu"}           (bytes)
    {"turn": ids, "steps"}      -> {"vision", "prefill", "time_to_first_token", "decode"}                    (seconds)
    {"warm_up": ids, "steps"}   -> {"first_token", "tokens", "anonymous", "peak", "gpu"}
    whatever fails              -> {"error": one line, "fixable": whether it says how}

"first_token" is the likeliest of every row, "tokens" [batch, 1 + steps] are those that were taken. "gpu" is what the
request took of the GPU's memory while no other process asked for any.

Another runtime takes part with a program of its own that answers so (subjects.Subject.command; examples/peer_models has
two). It may leave out "vision", and on the CPU "gpu", give null for memory that it does not know, and say in
"runtime", beside "seconds", which runtime it is.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from typing import Any

from popcompile.bench.memory import AnonymousPeak, anonymous_bytes, peak_bytes
from popcompile.bench.runners import Runner, open_runner
from popcompile.errors import PopcompileError
from popcompile.export.providers import PROVIDERS
from popcompile.runtime.gpu import gpu_bytes


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
            reply = {"error": str(error), "fixable": True}
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}", "fixable": False}
        print(json.dumps(reply), file=replies, flush=True)


class _Worker:
    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "load" in request:
            return self._load(request)
        if "warm_up" in request:
            return self._warm_up(request["warm_up"], request["steps"])
        return self._turn(request["turn"], request["steps"])

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        self._on_gpu = PROVIDERS[request["provider"]].gpu
        taken, started = self._gpu_bytes(), time.perf_counter()
        self._runner: Runner = open_runner(request["load"], request["provider"], request["threads"], request["images"])
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "anonymous": anonymous_bytes(), "gpu": self._gpu_bytes() - taken}

    def _warm_up(self, ids: list[list[int]], steps: int) -> dict[str, Any]:
        """A turn whose time does not count; its memory does."""
        runner, prompt, taken = self._runner, self._runner.encode(ids), self._gpu_bytes()
        with AnonymousPeak() as anonymous:
            runner.begin(prompt, steps)
            runner.see(prompt)
            runner.prefill(prompt)
            first = runner.likeliest()
            tokens = [runner.pick(), *(runner.step() for _ in range(steps))]
            runner.end()
        memory = {"anonymous": anonymous.bytes, "peak": peak_bytes(), "gpu": self._gpu_bytes() - taken}
        return {"first_token": first, "tokens": list(zip(*tokens, strict=True)), **memory}

    def _turn(self, ids: list[list[int]], steps: int) -> dict[str, float]:
        runner, prompt = self._runner, self._runner.encode(ids)
        gc.collect()
        began = time.perf_counter()
        runner.begin(prompt, steps)
        begun = time.perf_counter()
        runner.see(prompt)
        given = time.perf_counter()
        runner.prefill(prompt)
        encoded = time.perf_counter()
        runner.pick()
        picked = time.perf_counter()
        for _ in range(steps):
            runner.step()
        done = time.perf_counter()
        runner.end()
        return {
            "vision": given - begun,
            "prefill": encoded - given,
            "time_to_first_token": picked - began,
            "decode": done - picked,
        }

    def _gpu_bytes(self) -> int:
        return (gpu_bytes() or 0) if self._on_gpu else 0


if __name__ == "__main__":
    main()
