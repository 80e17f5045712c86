"""OpenVINO GenAI as a subject of `popcompile bench`: python openvino_worker.py [PROPERTY=VALUE ...]

It runs in OpenVINO's own environment, which has no popcompile, and answers as popcompile/bench/worker.py does, one
prompt at a time. Times are those that the pipeline measures itself. It generates as LLMPipeline does by default, but
keeps no prompt: by default a prompt that was seen before is looked up, and bench gives every prompt several times.

    PROPERTY=VALUE    properties of OpenVINO's CPU plugin, for example INFERENCE_PRECISION_HINT=f32
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    worker = _Worker(dict(argument.split("=", 1) for argument in sys.argv[1:]))
    for line in sys.stdin:
        try:
            reply = worker.answer(json.loads(line))
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}", "fixable": False}
        print(json.dumps(reply), file=replies, flush=True)


class _Worker:
    def __init__(self, properties: dict[str, str]) -> None:
        self._properties = properties

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        if "load" in request:
            return self._load(request["load"]["path"], request["threads"])
        if "warm_up" in request:
            tokens, _ = self._generate(request["warm_up"], request["steps"])
            return {"first_token": tokens[:1], "tokens": [tokens], "anonymous": None, "peak": None}
        _, times = self._generate(request["turn"], request["steps"])
        return times

    def _load(self, folder: str, threads: int) -> dict[str, Any]:
        began = time.perf_counter()
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = sys.maxsize  # a whole prompt at once, as by default
        properties = self._properties | {"INFERENCE_NUM_THREADS": threads, "scheduler_config": scheduler}
        self._pipeline = genai.LLMPipeline(folder, "CPU", **properties)
        precision = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
        version = genai.__version__.partition("-")[0]
        runtime = f"openvino-genai {version} (computes in {precision} unless told otherwise)"
        return {"seconds": time.perf_counter() - began, "anonymous": None, "runtime": runtime}

    def _generate(self, ids: list[list[int]], steps: int) -> tuple[list[int], dict[str, float]]:
        """The tokens after a prompt, ids [1, length], 1 + steps of them, and seconds."""
        config = genai.GenerationConfig()
        config.max_new_tokens = steps + 1
        config.ignore_eos, config.do_sample = True, False
        prompt = openvino.Tensor(np.array(ids))
        began = time.perf_counter()
        result = self._pipeline.generate(prompt, config)
        seconds = time.perf_counter() - began
        (tokens,) = result.tokens
        measured = result.perf_metrics.raw_metrics
        if len(tokens) != steps + 1:
            raise RuntimeError(f"it made {len(tokens)} tokens, where {steps + 1} were asked for")
        first = measured.m_times_to_first_token[0] / 1e6
        prefill = measured.token_infer_durations[0] / 1e6
        return list(tokens), {"prefill": prefill, "time_to_first_token": first, "decode": seconds - first}


if __name__ == "__main__":
    main()
