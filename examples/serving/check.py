"""Replicas killed under load: python examples/serving/check.py PACKAGE

Starts Ray on this machine with two replicas each of Prefill and Decode, sends requests at once with OpenAI's client,
half of them streamed and every third for two answers, and kills the process of a replica of Decode while text streams
from it, then one of Prefill. Every answer has to come whole and be popcompile's own. Needs "popcompile[serve]" and
"ray[serve]".
"""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import ray
from app import build
from openai import AsyncOpenAI, OpenAIError
from ray import serve
from tabulate import tabulate

import popcompile
from popcompile.package.configs import load_tokenizer

QUESTIONS = ["What is a B-tree?", "Name three rivers.", "Why is the sky blue?", "Write a haiku about tests."]
#: what all prompts begin with
SYSTEM = "You answer in one short paragraph, and say so where you do not know. " * 12
SECONDS = 300


@dataclass
class Answer:
    """n: how often the question is answered. texts: what has come; error: why no more did, empty where all came."""

    question: str
    is_streamed: bool
    n: int = 1
    texts: list[str] = field(init=False)
    cached: int = 0
    error: str = "not asked"

    def __post_init__(self) -> None:
        self.texts = [""] * self.n


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--requests", type=int, default=16, help="sent at once (default 16)")
    parser.add_argument("--new-tokens", type=int, default=48, help="of an answer (default 48)")
    options = parser.parse_args()
    package = options.package.resolve()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    serve.run(build({"package": str(package), "prefill": "2", "decode": "2"}))
    answers = [Answer(QUESTIONS[i % len(QUESTIONS)], i % 2 == 0, 1 + (i % 3 == 0)) for i in range(options.requests)]
    killed = asyncio.run(_ask_and_kill(package.name, answers, options.new_tokens))
    _wait_for_replicas()
    serve.shutdown()
    expected = _expected(package, options.new_tokens)
    rows = [
        [a.question, a.n, "streamed" if a.is_streamed else "whole", a.cached, a.error or "all", _same(a, expected)]
        for a in answers
    ]
    head = ["question", "answers", "asked for", "tokens cached", "came", "as popcompile's"]
    print(tabulate(rows, head, tablefmt="github"))
    good = sum(not a.error and set(a.texts) == {expected[a.question]} for a in answers)
    print(f"killed {', '.join(killed)}; {good} of {len(answers)} answers whole and the same")
    raise SystemExit(good < len(answers))


async def _ask_and_kill(model: str, answers: list[Answer], new_tokens: int) -> list[str]:
    """Ask all at once; returns what was killed meanwhile."""
    client = AsyncOpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none", max_retries=0, timeout=SECONDS)
    running = [asyncio.create_task(_ask(client, model, answer, new_tokens)) for answer in answers]
    killed = []
    for name in ("Decode", "Prefill"):
        while not any(a.is_streamed and a.texts[0] and a.error for a in answers):  # until text streams
            await asyncio.sleep(0.01)
        victim = _busiest(name)
        victim.kill()
        killed.append(f"{name}, process {victim.pid}")
        await asyncio.sleep(0.5)
        running += [asyncio.create_task(_ask(client, model, answer, new_tokens)) for answer in _more(answers)]
    await asyncio.gather(*running)
    return killed


def _more(answers: list[Answer]) -> list[Answer]:
    """Two more requests, so that there is work for what is killed next."""
    more = [Answer(question, True) for question in QUESTIONS[:2]]
    answers += more
    return more


async def _ask(client: AsyncOpenAI, model: str, answer: Answer, new_tokens: int) -> None:
    messages = _messages(answer.question)
    request = {"model": model, "messages": messages, "max_tokens": new_tokens, "temperature": 0, "n": answer.n}
    try:
        if answer.is_streamed:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            async for chunk in await client.chat.completions.create(**request, **options):
                for choice in chunk.choices:
                    answer.texts[choice.index] += choice.delta.content or ""
                answer.cached = chunk.usage.prompt_tokens_details.cached_tokens if chunk.usage else 0
        else:
            whole = await client.chat.completions.create(**request)
            answer.texts = [choice.message.content for choice in whole.choices]
            answer.cached = whole.usage.prompt_tokens_details.cached_tokens
        answer.error = ""
    except OpenAIError as error:
        answer.error = str(error)


def _messages(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def _busiest(deployment: str) -> psutil.Process:
    """Of a deployment's replicas, which Ray starts below this process, the one that has worked most."""
    found = [p for p in psutil.Process().children(recursive=True) if f"ServeReplica:default:{deployment}" in _title(p)]
    return max(found, key=lambda process: process.cpu_times().user)


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _wait_for_replicas() -> None:
    """Until those that were killed are there again."""
    began = time.monotonic()
    while time.monotonic() < began + SECONDS:
        deployments = serve.status().applications["default"].deployments
        states = [deployments[name].replica_states for name in ("Prefill", "Decode")]
        if all(set(state) == {"RUNNING"} and state["RUNNING"] == 2 for state in states):
            return
        time.sleep(0.5)
    raise SystemExit("the replicas that were killed did not come back")


def _expected(package: Path, new_tokens: int) -> dict[str, str]:
    """The model's own answers to all questions."""
    tokenizer, answers = load_tokenizer(package), {}
    with popcompile.load(package) as model:
        for question in QUESTIONS:
            inputs = tokenizer.apply_chat_template(
                _messages(question), add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            tokens = model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)
            answers[question] = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def _same(answer: Answer, expected: dict[str, str]) -> str:
    whole = expected[answer.question]
    same = (whole.startswith(text) if answer.error else text == whole for text in answer.texts)
    return "yes" if all(same) else "no"


if __name__ == "__main__":
    main()
