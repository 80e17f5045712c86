"""Calibration on text and images: which rows there are, what maps of one kind lose on the other, and what decides."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import vision_reference as reference
from bad_input import Cli
from image_attention_reference import IMAGE_TOKENS, gemma3
from PIL import Image
from test_choice import loss
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from vision_checkpoint import MARKS, TEMPLATE, draw_picture, save_gemma_checkpoint
from vision_reference import BEGIN, IMAGE
from vision_subject import VisionSubject

import popcompile
from popcompile import conversion
from popcompile.package.manifest import read_manifest
from popcompile.package.measurements import read_measurements
from popcompile.package.report import Loss
from popcompile.pruning import image_calibration
from popcompile.pruning.calibration_set import CalibrationSet, calibration_set
from popcompile.pruning.held_out import HeldOutKinds
from popcompile.pruning.hidden_states import HiddenStates
from popcompile.pruning.regression import calibrate
from popcompile.pruning.rows import Rows
from popcompile.pruning.search import Budget
from popcompile.report.inspection import inspect_text
from popcompile.report.page import html_report
from popcompile.runtime.verify import verify
from popcompile.text.lists import FORMS, find_words

CONTEXT, TEXTS = 160, 12
FEW: dict[str, Any] = {"calibration_texts": 12, "refinement_steps": 3, "window": 16}


def five_layers(folder: Path) -> VisionSubject:
    return VisionSubject.saved(folder, max_position_embeddings=CONTEXT, num_hidden_layers=5)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> VisionSubject:
    folder = tmp_path_factory.mktemp("models") / "vision"
    return five_layers(folder)


def prompts_of(subject: VisionSubject, pictures: Path | None = None, seed: int = 0, window: int = 16) -> CalibrationSet:
    return calibration_set(
        "self", subject.program, subject.read, subject.images.processor.tokenizer,
        replace(subject.images, pictures=pictures), texts=TEXTS, window=window, prompt_tokens=CONTEXT, seed=seed,
    )  # fmt: skip


@pytest.fixture(scope="module")
def prompts(subject: VisionSubject) -> CalibrationSet:
    with torch.no_grad():
        return prompts_of(subject)


# --- rows ------------------------------------------------------------------------------------------------------


def test_half_of_the_rows_have_images(prompts: CalibrationSet) -> None:
    text, images = prompts.text, prompts.images
    assert images is not None and text.calibration.images is None
    assert len(text.calibration) == len(images.calibration) == TEXTS // 2 and len(prompts.fit) == TEXTS
    assert len(images.held_out) == len(images.unseen) == 12 and images.source == "self-made pictures"
    for rows in (images.calibration, images.held_out, images.unseen):
        assert rows.length == CONTEXT and rows.images is not None
        seen = rows.images.index >= 0
        in_prompt = slice(images.prompt)
        assert torch.equal(rows.ids[:, in_prompt] == IMAGE, seen[:, in_prompt]) and not seen[:, images.prompt :].any()
        assert seen.any(1).all() and len(set(seen.sum(1).tolist())) > 2, "of several sizes"
        assert torch.equal(rows.ids[:, images.prompt - 1], torch.full((len(rows),), 7)), "the template's last token"


def test_the_parts_have_no_picture_in_common(prompts: CalibrationSet) -> None:
    assert prompts.images is not None
    parts = (prompts.images.calibration, prompts.images.held_out, prompts.images.unseen)
    first = [{tuple(features_of(part, i)[0].tolist()) for i in range(len(part))} for part in parts]
    assert sum(map(len, first)) == len(set().union(*first)) == TEXTS // 2 + 24


def features_of(rows: Rows, row: int) -> torch.Tensor:
    assert rows.images is not None
    index = rows.images.index[row]
    return rows.images.features[index[index >= 0]]


@torch.no_grad()
def test_a_seed_repeats_the_rows(subject: VisionSubject, prompts: CalibrationSet) -> None:
    same, other = prompts_of(subject), prompts_of(subject, seed=1)
    assert torch.equal(prompts.fit.ids, same.fit.ids) and not torch.equal(prompts.fit.ids, other.fit.ids)
    for found in (prompts, same, other):
        assert found.fit.images is not None
    features = [found.fit.images.features for found in (prompts, same, other) if found.fit.images is not None]
    assert torch.equal(features[0], features[1])
    assert features[0].shape != features[2].shape or not torch.equal(features[0], features[2])


@torch.no_grad()
def test_without_a_tokenizer_or_room_there_is_text_alone(subject: VisionSubject, tmp_path: Path) -> None:
    alone = calibration_set(
        "self", subject.program, subject.read, None, None, texts=TEXTS, window=16, prompt_tokens=CONTEXT, seed=0
    )
    assert alone.images is None and len(alone.fit) == TEXTS
    short = VisionSubject.saved(tmp_path / "short", max_position_embeddings=64, num_hidden_layers=2)
    assert prompts_of(short, window=4).images is None
    draw_picture(tmp_path / "a.png", 20, 20)
    with pytest.raises(popcompile.PopcompileError, match="context of 64 tokens is too short for rows with a picture"):
        prompts_of(short, pictures=tmp_path, window=4)


@torch.no_grad()
def test_the_users_pictures(subject: VisionSubject, tmp_path: Path) -> None:
    """Of which none decides that is calibrated on; large ones are made smaller."""
    for i in range(24):
        draw_picture(tmp_path / f"{i:02}.png", 16 + 9 * i, 400 - 12 * i, str(i))
    (tmp_path / "notes.txt").write_text("no picture")
    found = prompts_of(subject, pictures=tmp_path)
    images = found.images
    assert images is not None and images.source == f"pictures of {tmp_path.name}"
    parts = [
        {tuple(features_of(part, i)[0].tolist()) for i in range(len(part))}
        for part in (images.calibration, images.held_out, images.unseen)
    ]
    assert all(len(part) > 1 for part in parts)
    assert not parts[0] & parts[1] and not parts[1] & parts[2] and not parts[0] & parts[2]


def test_images_of_one_size_that_see_all_of_themselves(tmp_path: Path) -> None:
    """Gemma 3: rows, and a conversion whose maps lose less on them than the layers' own projections."""
    model = reference.random_model(gemma3(layers=6, max_position_embeddings=CONTEXT))
    found = VisionSubject(model, save_gemma_checkpoint(model, tmp_path / "model"))
    with torch.no_grad():
        prompts = prompts_of(found)
    assert prompts.images is not None
    rows = prompts.images.calibration
    assert rows.images is not None
    counts = (rows.images.index >= 0).sum(1)
    assert torch.equal(counts, torch.full((TEXTS // 2,), IMAGE_TOKENS)) and len(prompts.fit) == TEXTS
    begins = (rows.images.index >= 0).int().argmax(1)
    assert all(rows.ids[i, b - 1] == BEGIN for i, b in enumerate(begins.tolist())) and len(set(begins.tolist())) > 2
    popcompile.convert(found.folder, tmp_path / "out", layers="2-4", **FEW)
    quality = json.loads((tmp_path / "out" / "report.json").read_bytes())["quality"]
    ours, own = (quality[which]["images"] for which in ("loss", "own_projection"))
    assert 0 < ours["kl"] < 0.8 * own["kl"]


# --- lists in pictures -----------------------------------------------------------------------------------------

SYLLABLES = ("ba", "do", "fi", "gu", "ke", "la", "mo", "ni", "pu", "ra", "so", "ti")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> VisionSubject:
    """A tokenizer that has words and digits, and large pictures."""
    folder = tmp_path_factory.mktemp("models") / "reader"
    size = 256
    found = VisionSubject.saved(folder, 1 << 16, max_position_embeddings=512, vocab_size=size, num_hidden_layers=2)
    names = {i: name for name, i in MARKS.items()}
    words = [a + b + c for a in SYLLABLES for b in SYLLABLES for c in ("na", "re")]
    spare = iter(["<unk>", *map(str, range(10)), *',.|{}:-"', "w5", "w6", "w7", *words])
    vocabulary = {names.get(i) or next(spare): i for i in range(size)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)]
    )
    tokenizer.add_special_tokens(list(MARKS))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return found


@torch.no_grad()
def test_lists_stand_in_pictures_and_are_asked_for(reader: VisionSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[Any] = []
    monkeypatch.setattr(image_calibration, "_List", remembering(image_calibration._List, listed))
    monkeypatch.setattr("popcompile.pruning.text._ASKED_TOKENS", 1024)
    found = calibration_set(
        "self", reader.program, reader.read, reader.images.processor.tokenizer, reader.images, texts=TEXTS, window=16,
        prompt_tokens=400, seed=0,
    )  # fmt: skip
    text, images = found.text, found.images
    assert images is not None and images.retrieval_held_out is not None and images.retrieval_unseen is not None
    assert text.retrieval_held_out is not None and images.retrieval_refinement is not None
    assert len(images.retrieval_held_out.rows) == len(text.retrieval_held_out.rows) // 2 == 2
    assert images.asked_tokens == text.asked_tokens == 384
    assert len(images.calibration) == TEXTS // 2 + 1 and len(listed) == 2 + 2 + 32 + 1
    tokenizer = reader.images.processor.tokenizer
    for asked, its in zip((images.retrieval_unseen, images.retrieval_held_out), (listed[:2], listed[2:4]), strict=True):
        assert asked.rows.length == 512 and not asked.answers[:, :384].any() and asked.answers[:, 384:].any(1).all()
        for ids, answers, one in zip(asked.rows.ids, asked.answers, its, strict=True):
            assert 4 <= len(one.shown) <= len(one._values)
            spoken = tokenizer.decode(ids[answers]).replace(" ", "")
            values = "".join(one.shown.values())
            assert spoken and set(spoken) <= set(values)
            after = tokenizer.decode(ids[384:])
            left_out = set(one._values) - set(one.shown)
            assert any(key in after for key in one.shown) and not any(key in after for key in left_out)
    assert found.refinement is not None and len(found.refinement.rows) == 128 + 32
    assert found.refinement.answers.any(1).all()


def remembering(cls: Any, made: list[Any]) -> Callable[..., Any]:
    def make(*args: Any) -> Any:
        made.append(cls(*args))
        return made[-1]

    return make


def test_a_list_asks_for_what_there_was_room_for(reader: VisionSubject) -> None:
    tokenizer = reader.images.processor.tokenizer
    words = find_words(tokenizer, 0)
    values = dict(zip(words[:12], words[12:24], strict=True))
    for form in FORMS:
        listed = image_calibration._List(form, values, lambda _: (220, 60), random.Random(0))
        assert isinstance(listed.draw(0.0), Image.Image)
        assert 0 < len(listed.shown) < 6 and set(listed.shown.items()) < set(values.items())
        ids, answers = listed.ask(tokenizer, 60)
        assert len(ids) >= 60 and len(ids) == len(answers)
        spoken = {tokenizer.decode([i]) for i, is_answer in zip(ids, answers, strict=True) if is_answer}
        assert spoken == set(listed.shown.values())


# --- what maps lose --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_maps_of_one_kind_lose_more_on_the_other(
    subject: VisionSubject, prompts: CalibrationSet, tmp_path: Path
) -> None:
    """Images and text have unlike hidden states; those fitted to both serve both."""
    pruned = [2, 3, 4]
    held_out = prompts.held_out(subject.layers, 1, 16, 0, tmp_path)
    assert prompts.images is not None
    kinds = {"text": prompts.text.calibration, "images": prompts.images.calibration, "both": prompts.fit}
    kl: dict[str, tuple[float, float]] = {}
    for name, rows in kinds.items():
        found = held_out.measure(pruned, calibrate(HiddenStates(subject.layers, rows, 1, tmp_path), pruned))
        assert found.images is not None
        kl[name] = found.kl, found.images.kl
    assert kl["text"][1] > 1.2 * kl["both"][1], kl
    assert kl["images"][0] > 1.2 * kl["both"][0], kl


class Canned:
    """A HeldOut that knows what it measures."""

    model, first, window = None, 1, 8

    def __init__(self, known: Loss) -> None:
        self.known, self.measured = known, 0

    def at(self, window: int) -> Canned:
        other = Canned(replace(self.known, kl=self.known.kl * 8 / window))
        other.window = window
        return other

    def measure(self, pruned: list[int], calibration: Any, limit: float = math.inf) -> Loss:
        self.measured += 1
        return self.known


def test_the_kind_that_loses_more_decides() -> None:
    def both(text: Any, images: Any) -> Any:
        return HeldOutKinds(text, images)

    text, images = Canned(loss(0.02, 1.1)), Canned(loss(0.03, 1.05))
    found = both(text, images).measure([1], None)
    assert (found.first_token_kl, found.worst_kl, found.worst_ppl_ratio) == (0.02, 0.03, 1.1)
    assert Budget(max_kl=0.02).spent(found) == pytest.approx(1.5) and not found.is_bound
    swapped = both(images, text).measure([1], None)
    assert (swapped.worst_kl, swapped.worst_ppl_ratio) == (0.03, 1.1)
    assert Budget(max_ppl_ratio=1.05).spent(swapped) == pytest.approx(2)
    assert both(text, images).at(4).window == 4
    assert both(text, None).measure([1], None) is text.known
    before = images.measured
    over = both(text, images).measure([1], None, limit=0.01)
    assert over.images is None and over.is_bound and images.measured == before, "images were not run"


# --- conversions -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def package(subject: VisionSubject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packages") / "out"
    popcompile.convert(subject.folder, out, max_kl=2.0, **FEW)
    return out


def test_a_report_has_both_kinds(package: Path) -> None:
    report, manifest = json.loads((package / "report.json").read_bytes()), read_manifest(package)
    found = read_measurements(report, manifest)
    assert found.quality is not None and found.choice is not None and found.quality.own_projection is not None
    assert found.quality.images == "12 prompts with self-made pictures"
    assert manifest.kv_projection == "calibrated" and len(manifest.pruned) > 1
    for measured in (found.quality.loss, found.quality.own_projection, *(p.loss for p in found.choice.frontier)):
        assert measured.images is not None and measured.images.images is None
        assert measured.worst_kl == max(measured.first_token_kl, measured.kl, measured.images.worst_kl)
    assert found.quality.loss.images is not None and found.quality.own_projection.images is not None
    assert found.quality.loss.images.kl < 0.8 * found.quality.own_projection.images.kl
    assert report["quality"]["loss"]["images"]["ppl_ratio"] == found.quality.loss.images.ppl_ratio
    assert len(verify(package)) >= 4


def test_it_is_shown(package: Path) -> None:
    found = read_measurements(json.loads((package / "report.json").read_bytes()), read_manifest(package))
    assert found.quality is not None and found.quality.loss.images is not None
    kl = f"{found.quality.loss.images.first_token_kl:.4f}"
    text = inspect_text(package)
    assert f"prompts with images: first-token KL {kl}" in " ".join(text.split())
    assert "12 prompts with self-made pictures" in " ".join(text.split())
    assert not [line for line in text.splitlines() if len(line) > 80 and "/" not in line]
    assert "image: the worst KL of prompts with images" in text
    (chosen,) = [line.split() for line in text.splitlines() if line.endswith(" *")]
    (picked,) = [p.loss.images for p in found.choice.frontier if p.chosen] if found.choice else []
    assert picked is not None and chosen[-2] == f"{picked.worst_kl:.4f}"
    page = html_report(package)
    assert "this package, prompts with images" in page and "images: first-token KL" in page and kl in page
    assert "For prompts with images these are" in page


@pytest.mark.parametrize(
    ("place", "options", "words"),
    [
        ("missing", [], "no such folder; give a folder with pictures"),
        ("a.png", [], "is a file; give the folder that it is in"),
        ("empty", [], "has no pictures; give a folder with .png, .jpg, .jpeg, .webp, "),
        ("broken", [], "broken/b.png: no picture that can be read"),
        ("good", ["--text-only"], "qwen3_vl_text takes no images; leave the option out"),
    ],
)
def test_pictures_that_cannot_be_used(
    place: str, options: list[str], words: str, subject: VisionSubject, cli: Cli, tmp_path: Path
) -> None:
    for name in ("empty", "broken", "good"):
        (tmp_path / name).mkdir()
    for file in ("a.png", "broken/a.png", "good/a.png"):
        draw_picture(tmp_path / file, 20, 20)
    (tmp_path / "empty" / "notes.txt").write_text("no picture")
    (tmp_path / "broken" / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    line = cli.refuses("convert", subject.folder, tmp_path / "out", "--calibration-images", tmp_path / place, *options)
    assert words in line and str(tmp_path / place) in line


def test_pictures_without_a_way_to_ask_about_them(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No chat template: refused before any work."""
    monkeypatch.setattr(conversion, "trace", lambda *_, **__: pytest.fail("traced"))
    model = five_layers(tmp_path / "model").folder
    (tmp_path / "pictures").mkdir()
    draw_picture(tmp_path / "pictures" / "a.png", 20, 20)
    (model / "chat_template.jinja").unlink()
    line = cli.refuses("convert", model, tmp_path / "out", "--calibration-images", tmp_path / "pictures")
    assert "has no processor with a chat template" in line and f"--calibration-images {tmp_path / 'pictures'}" in line


def test_a_template_that_refuses_pictures(cli: Cli, tmp_path: Path) -> None:
    model = five_layers(tmp_path / "model").folder
    (model / "chat_template.jinja").write_text("{{ raise_exception('no parts, please') }}")
    line = cli.refuses("convert", model, tmp_path / "out")
    assert "refuses a prompt with a picture" in line and "no parts, please" in line
    assert "--kv-projection layer with --prune 1/3 or --layers" in line
