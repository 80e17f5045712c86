"""Self-made texts whose answers stand in them, and what pruning costs there."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated import Traced, random_maps, reference_maps
from conftest import tiny_llama, transformers_forward
from reference import pop_prefill
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from popcompile.evaluation.questions import DEPTHS, KINDS, questions
from popcompile.package.report import Loss
from popcompile.pruning import held_out
from popcompile.pruning.held_out import HeldOut
from popcompile.pruning.layerwise import LayerwiseModel
from popcompile.pruning.pruned_prefill import Prompts, last_hidden_state
from popcompile.pruning.rows import AskedRows, Rows
from popcompile.text.documents import default_texts
from popcompile.text.lists import RetrievalText, retrieval_text

TOKENS, LISTED = 320, 192


@pytest.fixture(scope="module")
def tokenizer(smollm2_checkpoint: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(smollm2_checkpoint)


def values_of(tokenizer: PreTrainedTokenizerBase, text: RetrievalText, row: int) -> list[str]:
    """The answers of a row, in order."""
    found, last = [], -2
    for place in text.answers[row].nonzero()[:, 0].tolist():
        piece = tokenizer.decode([int(text.rows[row, place])])
        if place == last + 1:
            found[-1] += piece
        else:
            found.append(piece)
        last = place
    return [value.strip() for value in found]


def test_every_answer_stands_in_the_list(tokenizer: PreTrainedTokenizerBase) -> None:
    """Once, where the list is; so nothing but the context can tell it."""
    text = retrieval_text(tokenizer, 8, TOKENS, LISTED, seed=0)
    assert text is not None and text.rows.shape == text.answers.shape == (8, TOKENS)
    beginnings = set()
    for row, ids in enumerate(text.rows):
        listed = tokenizer.decode(ids[: int(text.answers[row].int().argmax())])
        values = values_of(tokenizer, text, row)[:-1]  # the last one may be cut off
        assert len(values) > 5
        for value in set(values):
            assert listed.count(value) >= 1, (value, listed)
        beginnings.add(listed[:4])
        # what is measured after a prompt of four fifths
        assert text.answers[row, TOKENS * 4 // 5 :].sum() >= 4
        assert not text.answers[row, : LISTED - 16].any()
    assert len(beginnings) == 4  # forms


def test_long_texts(tokenizer: PreTrainedTokenizerBase) -> None:
    """Those of a window of 256 tokens: many lines have fewer tokens together than each on its own."""
    text = retrieval_text(tokenizer, 4, 1024, 563, seed=1)
    assert text is not None and text.rows.shape == (4, 1024) and text.answers[:, 819:].any(1).all()


def test_texts_come_from_the_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    one, same, other = (retrieval_text(tokenizer, 4, TOKENS, LISTED, seed) for seed in (1, 1, 2))
    assert one is not None and same is not None and other is not None
    assert torch.equal(one.rows, same.rows) and torch.equal(one.answers, same.answers)
    assert not torch.equal(one.rows, other.rows)


@pytest.mark.parametrize("tokens", [64, 300])
def test_questions_ask_for_what_stands_in_the_prompt(tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
    """At every depth; prompt and answer are what the tokenizer makes of both, and a prompt has its length at most."""
    asked = questions(tokenizer, default_texts()["prose"], 20, tokens, seed=0)
    assert [q.kind for q in asked] == ["list"] * 20 + ["passage"] * 20
    assert [q.depth for q in asked[:5]] == list(DEPTHS)
    places: dict[tuple[str, float], list[float]] = {}
    for question in asked:
        assert 0.6 * tokens < len(question.prompt) <= tokens
        prompt, answer = tokenizer.decode(question.prompt), tokenizer.decode(question.answer).strip()
        assert answer.isalpha() or (answer.isdecimal() and len(answer) == 4)
        assert answer in prompt
        whole = tokenizer(prompt + tokenizer.decode(question.answer), add_special_tokens=False)["input_ids"]
        assert whole == [*question.prompt.tolist(), *question.answer.tolist()]
        places.setdefault((question.kind, question.depth), []).append(prompt.index(answer) / len(prompt))
    for kind in KINDS:
        means = [sum(places[kind, depth]) / len(places[kind, depth]) for depth in DEPTHS]
        assert means == sorted(means) and means[-1] - means[0] > 0.4


def test_no_questions_where_there_is_no_room(tokenizer: PreTrainedTokenizerBase) -> None:
    documents = default_texts()["prose"]
    assert questions(tokenizer, documents, 5, 8, seed=0) == []
    assert {q.kind for q in questions(tokenizer, documents, 5, 40, seed=0)} == {"list"}
    assert questions(tokenizer, documents, 0, 300, seed=0) == []


@cache
def traced() -> Traced:
    return Traced.of(tiny_llama(num_hidden_layers=4))


@pytest.mark.parametrize("window", [1, 5])
def test_loss_of_answers_is_brute_force(window: int) -> None:
    """Of the answers' tokens after the prompt those that the whole model holds for the likeliest, by transformers."""
    random, prompt, pruned = torch.Generator().manual_seed(3), 20, [1, 2]
    model = traced().model
    rows = torch.randint(64, (6, 30), generator=random)
    answers = torch.zeros(6, 30, dtype=torch.bool)
    for row in range(6):
        for place in (21, 24, 25):
            # the whole model finds all but one of these
            if place != 24:
                rows[row, place] = transformers_forward(model, rows[row : row + 1, :place])[0][0, -1].argmax()
            answers[row, place] = True
        answers[row, 12] = True  # within the prompt: not measured
    calibration = random_maps(model, [1, 2], [1], seed=2)
    held = HeldOut(traced().layers, Rows(rows), 1, prompt, 0, window, AskedRows(Rows(rows), answers))
    loss = held.measure(pruned, calibration)
    kl, kept, found, by_row = [], [], [], []
    for row in rows:
        whole = transformers_forward(model, row[None])[0][0].double().log_softmax(-1)
        first, entries = pop_prefill(model, row[None, :prompt], pruned, None, *reference_maps(calibration), window)
        after = transformers_forward(model, row[None, prompt:-1], entries)[0]
        known = len(kl)
        ours = torch.cat((first, after), 1)[0].double().log_softmax(-1)
        for place in (21, 24, 25):
            p, q = whole[place - 1], ours[place - prompt]
            right = bool(p.argmax() == row[place])
            found.append(right)
            if right:
                kl.append(float((p.exp() * (p - q)).sum()))
                kept.append(bool(q.argmax() == row[place]))
        by_row.append(kl[known:])
    assert 0.5 < sum(found) / len(found) < 1 and 0 < sum(kept) < len(kept)
    assert loss.retrieval_found == pytest.approx(sum(found) / len(found))
    assert loss.retrieval_kl == pytest.approx(sum(kl) / len(kl), rel=1e-4)
    assert loss.retrieval_kept == pytest.approx(sum(kept) / len(kept))
    mean, some = sum(kl) / len(kl), [row for row in by_row if row]
    squares = sum((sum(row) - len(row) * mean) ** 2 for row in some) * len(some) / (len(some) - 1)
    assert loss.retrieval_kl_error == pytest.approx(squares**0.5 / len(kl), rel=1e-3)


def test_answers_in_prompts_of_another_length() -> None:
    """Longer ones than the text's; everything else is measured as it was."""
    rows = torch.randint(64, (4, 26), generator=torch.Generator().manual_seed(5))
    longer = torch.randint(64, (3, 31), generator=torch.Generator().manual_seed(6))
    answers = torch.zeros_like(longer, dtype=torch.bool)
    answers[:, 26:29] = True
    calibration = random_maps(traced().model, [2], [1], seed=2)
    text = AskedRows(Rows(longer), answers)
    held = HeldOut(traced().layers, Rows(rows), 1, 20, 0, 4)
    asked = HeldOut(traced().layers, Rows(rows), 1, 20, 0, 4, text, 24)
    alone = HeldOut(traced().layers, Rows(longer), 1, 24, 0, 4, text)
    one, other = (h.measure([1, 2], calibration) for h in (asked, alone))
    assert held.measure([1, 2], calibration).retrieval_found is None
    assert one.first_token_kl == held.measure([1, 2], calibration).first_token_kl
    assert (one.retrieval_found, one.retrieval_kl) == (other.retrieval_found, other.retrieval_kl)
    assert asked.at(4).measure([1, 2], calibration) == one != asked.at(2).measure([1, 2], calibration)


def found_at_21(count: int) -> AskedRows:
    """Rows of 30 tokens with three that are asked for, of which the whole model finds the first."""
    rows = torch.randint(64, (count, 30), generator=torch.Generator().manual_seed(3))
    answers = torch.zeros_like(rows, dtype=torch.bool)
    for row in range(count):
        rows[row, 21] = transformers_forward(traced().model, rows[row : row + 1, :21])[0][0, -1].argmax()
    answers[:, 21:24] = True
    return AskedRows(Rows(rows), answers)


def test_measuring_ends_where_the_loss_is_over_the_limit_for_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that lost most in sets before come first; what was seen is a lower bound of the whole loss."""
    lists = found_at_21(12)
    held = HeldOut(traced().layers, lists.rows, 1, 20, 0, 5, lists)
    calibration = random_maps(traced().model, [1, 2], [1], seed=2)
    batches: list[int] = []

    def counted(model: LayerwiseModel, prompts: Prompts, *args: Any) -> Tensor:
        batches.append(len(prompts.tail.positions))
        return last_hidden_state(model, prompts, *args)

    monkeypatch.setattr(held_out, "last_hidden_state", counted)
    assert not held.measure([1, 2], calibration, 1e-9).retrieval_kl  # over it by prose alone
    assert batches == [4, 4, 4]
    batches.clear()
    whole = held.measure([1, 2], calibration)
    assert batches == [4] * 6 and not whole.at_least and whole.retrieval_kl is not None
    assert held.measure([1, 2], calibration, whole.retrieval_kl * 1.01) == pytest.approx(whole)
    batches.clear()
    limit = 1.001 * max(whole.first_token_kl, whole.kl)
    assert limit < 0.9 * whole.retrieval_kl, "answers are what is over it"
    stopped = held.measure([1, 2], calibration, limit)
    assert batches == [4] * (3 + 2), "not the four rows that lose least"
    assert stopped.at_least and stopped.retrieval_kl is not None
    assert limit < stopped.retrieval_kl < whole.retrieval_kl
    assert (stopped.first_token_kl, stopped.ppl_ratio) == (whole.first_token_kl, whole.ppl_ratio)


def test_the_worse_loss_decides() -> None:
    loss = Loss(0.02, 0.0, 1.0, 0.01, 1.0, 1.0)
    assert loss.worst_kl == 0.02
    assert Loss(0.02, 0.0, 1.0, 0.01, 1.0, 1.0, 0.9, 0.3, 0.8).worst_kl == 0.3
    assert Loss(0.02, 0.0, 1.0, 0.4, 1.0, 1.0, 0.9, 0.3, 0.8).worst_kl == 0.4
