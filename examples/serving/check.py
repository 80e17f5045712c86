"""Two replicas behind one endpoint, one of them killed under load: python examples/serving/check.py PACKAGE

Starts Ray on this machine, sends requests at once, kills the process of a replica while text streams from it, and
compares every answer with popcompile's own. Lost may only be what was streaming from that replica.
Needs popcompile and "ray[serve]".
"""

from __future__ import annotations

import argparse
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx
import ray
from app import build
from ray import serve
from tabulate import tabulate
from transformers import AutoTokenizer

import popcompile

URL = "http://127.0.0.1:8000/generate"
QUESTIONS = ["What is a B-tree?", "Name three rivers.", "Why is the sky blue?", "Write a haiku about tests."]
SECONDS = 300


@dataclass
class Answer:
    """replica: whose text came first. text: what came; complete: all of it."""

    question: str
    replica: str = ""
    text: str = ""
    status: int = 0
    complete: bool = False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--requests", type=int, default=12, help="sent at once (default 12)")
    parser.add_argument("--new-tokens", type=int, default=48, help="of an answer (default 48)")
    options = parser.parse_args()
    package = options.package.resolve()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.run(build({"package": str(package), "replicas": "2"}))
    answers = [Answer(QUESTIONS[i % len(QUESTIONS)]) for i in range(options.requests)]
    with ThreadPoolExecutor(len(answers)) as pool:
        running = [pool.submit(_ask, answer, options.new_tokens) for answer in answers]
        victim = _kill_one(answers)
        for request in running:
            request.result()
    again = _wait_for_replicas(2)
    expected = {question: _expected(package, question, options.new_tokens) for question in QUESTIONS}
    rows = [[a.question, a.replica, a.status, "all" if a.complete else "a part", _same(a, expected)] for a in answers]
    print(tabulate(rows, ["question", "replica", "status", "text", "as popcompile's"], tablefmt="github"))
    lost = [a for a in answers if not a.complete]
    streamed = [a for a in lost if a.replica == victim and a.text]
    print(
        f"killed {victim}; {len(answers) - len(lost)} answers complete, {len(streamed)} cut off while streaming,"
        f" {len(lost) - len(streamed)} lost; two replicas again after {again:.0f} s"
    )
    serve.shutdown()
    raise SystemExit(len(lost) > len(streamed) or len(lost) > 1 or any(_same(a, expected) != "yes" for a in answers))


def _ask(answer: Answer, new_tokens: int) -> None:
    request = {"prompt": answer.question, "max_new_tokens": new_tokens}
    try:
        with httpx.stream("POST", URL, json=request, timeout=SECONDS) as response:
            answer.status, answer.replica = response.status_code, response.headers.get("X-Replica", "")
            for text in response.iter_text():
                answer.text += text
            answer.complete = response.status_code == 200
    except httpx.HTTPError:
        pass  # cut off: what has come is in `answer`


def _kill_one(answers: list[Answer]) -> str:
    """Wait for text from a replica, kill its process, and say which it was."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and any(a.status in (0, 200) and not a.complete for a in answers):
        victim = next((a.replica for a in answers if a.text and not a.complete), None)
        if victim:
            os.kill(int(victim.split()[-1]), signal.SIGKILL)
            return victim
        time.sleep(0.02)
    raise SystemExit("no replica has answered anything")


def _wait_for_replicas(count: int) -> float:
    began = time.monotonic()
    while time.monotonic() < began + SECONDS:
        replicas = serve.status().applications["default"].deployments["Model"].replica_states
        if replicas.get("RUNNING") == count and set(replicas) == {"RUNNING"}:
            break
        time.sleep(0.5)
    return time.monotonic() - began


def _expected(package: Path, question: str, new_tokens: int) -> str:
    tokenizer = AutoTokenizer.from_pretrained(package, trust_remote_code=False, local_files_only=True)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = popcompile.load(package).generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _same(answer: Answer, expected: dict[str, str]) -> str:
    text = expected[answer.question]
    return "yes" if (answer.text == text if answer.complete else text.startswith(answer.text)) else "no"


if __name__ == "__main__":
    main()
