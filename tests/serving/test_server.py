"""`popcompile serve` as a process, and a server whose clients leave."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from bad_input import TIMEOUT, Cli, assert_one_line
from openai import APIError, OpenAI
from served import NAME, Served

from popcompile.serving.app import create_app

PROMPT = "the cat sat w3 w7 w11 w5"


# --- the command -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _running(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], OpenAI, str]]:
    """`popcompile serve` at a free port, a client of it, and the line that it prints."""
    command = [sys.executable, "-m", "popcompile", "serve", str(folder), "--port", "0", "--threads", "1", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            address = line.split(" at ")[1].split(";")[0]
            yield process, OpenAI(base_url=address, api_key="none", max_retries=0, timeout=TIMEOUT), line
        finally:
            process.kill()


def test_command(served: Served) -> None:
    """It says where it listens in one line, answers OpenAI's client, and Ctrl-C ends it, with what it answers."""
    with _running(served.folder, "--served-model-name", "name", "--max-concurrent", "2") as (process, client, line):
        assert line.startswith("name at http://127.0.0.1:") and "curl" in line
        assert [model.id for model in client.models.list()] == ["name"]
        answer = client.completions.create(model="name", prompt=PROMPT, max_tokens=12)
        assert answer.choices[0].text == served.text(served.serially(PROMPT, 12))
        with pytest.raises(APIError, match="the model 'other' is not here"):
            client.completions.create(model="other", prompt=PROMPT)
        stream = client.chat.completions.create(
            model="name", messages=[{"role": "user", "content": PROMPT}], stream=True, logit_bias={}
        )
        next(stream)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(APIError):  # unless all of the answer was there already
            list(stream)
        out, err = process.communicate(timeout=TIMEOUT)
        assert (process.returncode, out, err) == (130, "", "")


def test_port_in_use(cli: Cli, served: Served) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port {port}: is in use" in cli.refuses("serve", served.folder, "--port", port)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--host", "nowhere.invalid"], "--host nowhere.invalid: unknown"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1: is no address of this machine"),
        (["--port", "70000"], "70000 is not a port"),
        (["--max-concurrent", "0"], "at least 1"),
        (["--prefix-cache-mb", "-1"], "at least 0"),
        (["--max-waiting", "-1"], "at least 0"),
        (["--prefill-chunk", "-1"], "at least 0"),
        (["--provider", "tpu"], "tpu"),
    ],
)
def test_wrong_options(options: list[str], part: str, cli: Cli, served: Served) -> None:
    assert part in cli.refuses("serve", served.folder, *options)


def test_no_package(cli: Cli, tmp_path: Path) -> None:
    assert str(tmp_path) in cli.refuses("serve", tmp_path, "--port", "0")


def test_without_its_libraries(served: Served) -> None:
    code = "import sys; sys.modules['uvicorn'] = None; from popcompile.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "serve", str(served.folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    assert_one_line(done.returncode, done.stdout, done.stderr)
    assert 'uvicorn; pip install "popcompile[serve]"' in done.stderr


# --- clients that leave ----------------------------------------------------------------------------------------


class Steps:
    """Of the model: how many were done, each a little slow, so that a whole answer would take seconds."""

    def __init__(self, feed: Callable[..., Any]) -> None:
        self._feed, self.prompts, self.done = feed, 0, 0

    def __call__(self, rows: Any, *rest: Any, **options: Any) -> Any:
        time.sleep(0.02)
        self.done += 1
        self.prompts += len(rows[0]) > 1
        return self._feed(rows, *rest, **options)

    def settle(self) -> int:
        """Their number once no more come."""
        while True:
            before = self.done
            time.sleep(0.3)
            if self.done == before:
                return before


@pytest.fixture
def slow(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Steps]]:
    """The address of a server with one place, and its model's steps."""
    steps = Steps(served.model.runtime.feed)
    monkeypatch.setattr(served.model.runtime, "feed", steps)
    app = create_app(NAME, served.prompts, served.engine(max_concurrent=1))
    with socket.create_server(("127.0.0.1", 0)) as opened:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, args=([opened],))
        thread.start()
        yield f"http://127.0.0.1:{opened.getsockname()[1]}/v1/completions", steps
        server.should_exit = True
        thread.join()


BODY = {"prompt": PROMPT, "max_tokens": 400}


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_a_stream_ends_it(slow: tuple[str, Steps], n: int) -> None:
    address, steps = slow
    with httpx.stream("POST", address, json=BODY | {"stream": True, "n": n}, timeout=TIMEOUT) as answer:
        lines = answer.iter_lines()
        assert json.loads(next(lines).removeprefix("data: "))["object"] == "text_completion"
    assert 0 < steps.settle() < 200


@pytest.mark.parametrize("n", [1, 3])
def test_leaving_a_whole_answer_ends_it(slow: tuple[str, Steps], n: int) -> None:
    address, steps = slow
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(address, json=BODY | {"n": n}, timeout=0.5)
    assert 0 < steps.settle() < 200


def test_leaving_the_queue(slow: tuple[str, Steps]) -> None:
    """Nothing is computed for a request that left before its turn, and those behind it get theirs."""
    address, steps = slow
    with httpx.stream("POST", address, json=BODY | {"stream": True}, timeout=TIMEOUT) as answer:
        lines = answer.iter_lines()
        next(lines)
        for stream in (False, True):
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(address, json=BODY | {"stream": stream}, timeout=0.3)
    steps.settle()
    assert steps.prompts == 1
    assert httpx.post(address, json=BODY | {"max_tokens": 2}, timeout=TIMEOUT).status_code == 200
    assert steps.prompts == 2
