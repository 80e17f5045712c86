"""onnxruntime-genai loads a package of either layout as it is and produces our runtime's tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from popcompile import load
from popcompile.runtime.generation import PopForCausalLM

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel for this platform")

NEW_TOKENS = 24

#: run in a process of its own: genai brings its own onnxruntime. Each conversation is rows of prompts, turn by turn.
GENERATE = """
import json, sys
import numpy as np
import onnxruntime_genai as og
folder, conversations, new_tokens, share = sys.argv[1], *map(json.loads, sys.argv[2:])
config = og.Config(folder)
config.overlay(json.dumps({"search": {"past_present_share_buffer": share}}))
model = og.Model(config)
for turns in conversations:
    params = og.GeneratorParams(model)
    length = sum(len(rows[0]) + new_tokens for rows in turns)
    params.set_search_options(max_length=length, min_length=length, batch_size=len(turns[0]), do_sample=False)
    generator = og.Generator(model, params)
    found = []
    for rows in turns:
        if found:  # the token that was generated last is not in the cache, and append_tokens does not put it there
            rows = [[found[-1][0][-1], *rows[0]]]
            generator.rewind_to(len(generator.get_sequence(0)) - 1)
        generator.append_tokens(np.asarray(rows if len(rows) > 1 else rows[0], dtype=np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
        found.append([generator.get_sequence(i)[-new_tokens:].tolist() for i in range(len(rows))])
    print(json.dumps(found))
"""

PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "A B-tree is a self-balancing tree data structure that maintains sorted data and allows searches, " * 32,
]
SECOND = "And what is a hash table good for? Tell me in a few words, please."


#: a conversation through genai's own tokenizer and chat template, streamed
CHAT = """
import json, sys
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
tokenizer = og.Tokenizer(model)
text = tokenizer.apply_chat_template(sys.argv[2], add_generation_prompt=True)
ids, new_tokens, streamed = tokenizer.encode(text), int(sys.argv[3]), tokenizer.create_stream()
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(ids) + new_tokens, min_length=len(ids) + new_tokens)
generator = og.Generator(model, params)
generator.append_tokens(ids)
pieces = []
while not generator.is_done():
    generator.generate_next_token()
    pieces.append(streamed.decode(generator.get_next_tokens()[0]))
print(json.dumps([text, [int(i) for i in ids], pieces]))
"""


def genai(package: Path, conversations: list[list[list[list[int]]]], share: bool) -> list[list[list[list[int]]]]:
    arguments = [json.dumps(given) for given in (conversations, NEW_TOKENS, share)]
    command = [sys.executable, "-c", GENERATE, str(package), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def ours(model: PopForCausalLM, turns: list[list[list[int]]]) -> list[list[list[int]]]:
    """The new tokens of every row, turn by turn."""
    ids, cache, found = torch.zeros((len(turns[0]), 0), dtype=torch.int64), None, []
    for rows in turns:
        ids = torch.cat((ids, torch.tensor(rows)), 1)
        output = model.generate(
            ids, past_key_values=cache, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        ids, cache = output.sequences, output.past_key_values
        found.append(ids[:, -NEW_TOKENS:].tolist())
    return found


@dataclass
class Answered:
    """A package, and what popcompile's runtime answers in conversations of rows of prompts, turn by turn."""

    package: Path
    conversations: list[list[list[list[int]]]]
    answers: list[list[list[list[int]]]]


@pytest.fixture(
    scope="module",
    params=[
        "smollm2_package",
        *(pytest.param(n, marks=pytest.mark.real) for n in ("gemma_package", "unified_package")),
    ],
)
def answered(request: pytest.FixtureRequest) -> Answered:
    """Prompts, one past Gemma's window of 512, a batch, and a second turn, which genai takes in one graph alone."""
    package: Path = request.getfixturevalue(request.param)
    tokenizer = AutoTokenizer.from_pretrained(package)
    short, code, long = ([tokenizer(text)["input_ids"]] for text in PROMPTS)
    conversations = [[short], [long], [[*short, short[0][::-1]]]]
    if request.param == "unified_package":
        conversations.append([code, [tokenizer(SECOND)["input_ids"]]])
    model = load(package, prefill="pop")
    return Answered(package, conversations, [ours(model, turns) for turns in conversations])


@pytest.mark.parametrize("share", [True, False])
def test_same_greedy_tokens(answered: Answered, share: bool) -> None:
    """With one buffer for past and present, and two.

    With two, genai 0.18 itself cannot go on with a second turn, whatever the model, and it rewinds no decoder-pipeline.
    """
    taken = [i for i, turns in enumerate(answered.conversations) if share or len(turns) == 1]
    found = genai(answered.package, [answered.conversations[i] for i in taken], share)
    assert found == [answered.answers[i] for i in taken]


@pytest.mark.real
def test_chat_is_streamed(unified_package: Path) -> None:
    """The package's tokenizer files and chat template mean the same to genai, and a stream is the whole answer."""
    messages = [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": "What is a B-tree?"}]
    command = [sys.executable, "-c", CHAT, str(unified_package), json.dumps(messages), str(NEW_TOKENS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    text, ids, pieces = json.loads(result.stdout)
    tokenizer = AutoTokenizer.from_pretrained(unified_package)
    assert text == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    ((expected,),) = ours(load(unified_package, prefill="pop"), [[ids]])
    assert len(pieces) == NEW_TOKENS and "".join(pieces) == tokenizer.decode(expected, skip_special_tokens=True)
