"""Answers over HTTP are the model's own, whole or streamed, whatever else is asked at the same time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam
from served import NAME, Served

PROMPT = "the cat sat w3 w7 w11 w5"
CHAT: list[ChatCompletionMessageParam] = [{"role": "system", "content": "the cat"}, {"role": "user", "content": "w9"}]


def test_greedy_completion(served: Served) -> None:
    answer = served.ask(lambda c: c.completions.create(model=NAME, prompt=PROMPT, max_tokens=12, temperature=0))
    expected = served.serially(PROMPT, 12)
    assert answer.choices[0].text == served.text(expected)
    assert answer.usage is not None
    usage = answer.usage.model_dump(exclude_unset=True)
    first = usage.pop("time_to_first_token")
    assert 0 < first < 60
    assert usage == {
        "prompt_tokens": 7, "completion_tokens": len(expected), "total_tokens": 7 + len(expected),
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("text_completion", NAME, "length")


@pytest.mark.parametrize("settings", [{"temperature": 0.8}, {"temperature": 1.5, "top_p": 0.7}, {"top_p": 0.9}])
def test_sampled_completion(settings: dict[str, float], served: Served) -> None:
    for seed in range(3):
        answer = served.ask(
            lambda c, seed=seed: c.completions.create(model=NAME, prompt=PROMPT, max_tokens=12, seed=seed, **settings)
        )
        expected = served.serially(PROMPT, 12, seed=seed, do_sample=True, **settings)
        assert answer.choices[0].text == served.text(expected)
    assert served.text(expected) != served.text(served.serially(PROMPT, 12))


def test_chat(served: Served) -> None:
    """The tiny model has no chat template: messages are lines."""
    answer = served.ask(lambda c: c.chat.completions.create(model=NAME, messages=CHAT, max_completion_tokens=5))
    message = answer.choices[0].message
    assert (message.role, message.content) == ("assistant", served.text(served.serially("the cat\nw9", 5)))
    parts: Any = [{"role": "developer", "content": [{"type": "text", "text": "the cat"}]}, CHAT[1]]
    again = served.ask(lambda c: c.chat.completions.create(model=NAME, messages=parts, max_completion_tokens=5))
    assert again.choices[0].message == message


def test_chat_template(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an answer that comes back as the client got it."""
    template = "{% for m in messages %}w{{ loop.index }} {{ m.content }} {% endfor %}w99"
    monkeypatch.setattr(served.prompts._encoder.tokenizer, "chat_template", template)
    turns: Any = [CHAT[1], {"role": "assistant", "content": "w4", "refusal": None, "tool_calls": None}, CHAT[1]]
    answer = served.ask(lambda c: c.chat.completions.create(model=NAME, messages=turns, max_completion_tokens=5))
    assert answer.usage is not None and answer.usage.prompt_tokens == 7
    assert answer.choices[0].message.content == served.text(served.serially("w1 w9 w2 w4 w3 w9 w99", 5))


def test_streamed_is_whole(served: Served) -> None:
    async def stream(client: AsyncOpenAI) -> tuple[str, list[Any]]:
        chunks = await client.chat.completions.create(
            model=NAME, messages=CHAT, max_tokens=9, stream=True, stream_options={"include_usage": True}
        )
        received = [chunk async for chunk in chunks]
        return "".join(c.choices[0].delta.content or "" for c in received if c.choices), received

    text, chunks = served.ask(stream)
    whole = served.ask(lambda c: c.chat.completions.create(model=NAME, messages=CHAT, max_tokens=9))
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons == [None] * (len(reasons) - 1) + [whole.choices[0].finish_reason]
    assert all(chunk.usage is None for chunk in chunks[:-1]) and not chunks[-1].choices
    assert whole.usage is not None and chunks[-1].usage.total_tokens == whole.usage.total_tokens
    assert chunks[-1].usage.time_to_first_token > 0


def test_stream_on_the_wire(served: Served) -> None:
    async def lines() -> list[str]:
        async with served.http() as http:
            body = {"prompt": PROMPT, "max_tokens": 2, "stream": True}
            answer = await http.post("/completions", json=body)
            assert answer.headers["content-type"].startswith("text/event-stream")
            return answer.text.split("\n\n")

    *events, done, end = asyncio.run(lines())
    assert events and all(event.startswith("data: {") and "usage" not in event for event in events)
    assert (done, end) == ("data: [DONE]", "")


def test_several_prompts_and_answers(served: Served) -> None:
    """Of each prompt n, the first with the seed and the others with those after it."""
    prompts = [PROMPT, "w1 w2"]
    settings: dict[str, Any] = {"prompt": prompts, "n": 2, "seed": 5, "temperature": 1.0, "max_tokens": 6}
    answer = served.ask(lambda c: c.completions.create(model=NAME, **settings))
    expected = [
        served.text(served.serially(prompt, 6, do_sample=True, temperature=1.0, seed=seed))
        for prompt in prompts
        for seed in (5, 6)
    ]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.usage is not None and answer.usage.prompt_tokens == 7 + 2


def test_token_ids(served: Served) -> None:
    rows = [served.ids(PROMPT)[0].tolist(), [3, 4, 5]]
    for prompt in (rows[0], rows):
        answer = served.ask(lambda c, p=prompt: c.completions.create(model=NAME, prompt=p, max_tokens=4))
        texts = [served.text(served.serially(row, 4)) for row in (rows if prompt is rows else rows[:1])]
        assert [choice.text for choice in answer.choices] == texts


def test_stop_strings(served: Served) -> None:
    """Wherever tokens end: this one begins in one and ends in another. The text ends before it."""
    text = served.text(served.serially(PROMPT, 20))
    at = text.index(" ", 8) - 1
    stop = text[at : at + 3]
    first = text.index(stop)
    for stops in (stop, ["never", stop]):
        for stream in (False, True):
            answer = served.ask(lambda c, s=stops, t=stream: _text_and_reason(c, t, stop=s, max_tokens=20))
            assert answer == (text[:first], "stop")
    assert served.ask(lambda c: _text_and_reason(c, False, stop="never", max_tokens=20)) == (text, "length")


async def _text_and_reason(client: AsyncOpenAI, stream: bool, **settings: Any) -> tuple[str, str]:
    answers = await client.completions.create(model=NAME, prompt=PROMPT, stream=stream, **settings)
    if not stream:
        return answers.choices[0].text, answers.choices[0].finish_reason
    choices = [chunk.choices[0] async for chunk in answers]
    return "".join(choice.text for choice in choices), choices[-1].finish_reason


def test_end_of_text_stops(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's end token counts and has no text."""
    tokens = served.serially(PROMPT, 20)
    monkeypatch.setattr(served.model.generation_config, "eos_token_id", tokens[3])
    length = tokens.index(tokens[3]) + 1
    answer = served.ask(lambda c: c.completions.create(model=NAME, prompt=PROMPT, max_tokens=20))
    assert answer.usage is not None and answer.usage.completion_tokens == length
    assert answer.choices[0].finish_reason == "stop"


def test_as_long_as_the_context(served: Served) -> None:
    """Without a limit a chat's answer may fill it; a completion's has 16 tokens, as in OpenAI's."""
    context = served.model.manifest.context_length
    long = " ".join(["w5", "w8"] * (context // 2 - 2))
    answer = served.ask(lambda c: c.chat.completions.create(model=NAME, messages=[{"role": "user", "content": long}]))
    assert answer.usage is not None
    assert answer.usage.total_tokens == context or answer.choices[0].finish_reason == "stop"
    short = served.ask(lambda c: c.completions.create(model=NAME, prompt=PROMPT))
    assert short.usage is not None and short.usage.completion_tokens == len(served.serially(PROMPT, 16))


@pytest.mark.parametrize("places", [16, 3])
def test_sixteen_at_once(places: int, served: Served) -> None:
    """Their answers are the serial ones, and those that came first do not wait for all the others."""
    asked: list[dict[str, Any]] = [
        {"prompt": f"the cat w{i} w{2 * i}", "max_tokens": 8 + i, "temperature": i % 2, "seed": i} for i in range(16)
    ]
    order: list[int] = []

    async def all_of_them(client: AsyncOpenAI) -> list[str]:
        async def one(i: int) -> str:
            answer = await client.completions.create(model=NAME, **asked[i])
            order.append(i)
            return answer.choices[0].text

        return await asyncio.gather(*map(one, range(16)))

    texts = served.ask(all_of_them, served.engine(max_concurrent=places))
    for request, text in zip(asked, texts, strict=True):
        sampled = {"do_sample": True, "temperature": 1.0} if request["temperature"] else {}
        tokens = served.serially(str(request["prompt"]), int(request["max_tokens"]), seed=request["seed"], **sampled)
        assert text == served.text(tokens)
    assert order.index(0) < order.index(15)


def test_models(served: Served) -> None:
    assert [m.id for m in served.ask(lambda c: c.models.list()).data] == [NAME]
    assert served.ask(lambda c: c.models.retrieve(NAME)).object == "model"
