"""`popcompile evaluate --images`: numbers against transformers' modules, answers that are written, what is saved."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from bad_input import Cli, popcompile, snapshot
from expected_metrics import assert_metrics, metrics_of
from resign import sign
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel
from vision_checkpoint import save_pictures
from vision_reference import Prompt, forward, given_of, next_token, pop_prefill

from popcompile.conversion import convert
from popcompile.evaluation.picture_questions import QUESTIONS, picture_questions
from popcompile.evaluation.pictures import evaluate_pictures
from popcompile.package.configs import load_processor
from popcompile.package.manifest import REPORT
from popcompile.report.evaluation import pictures_text
from popcompile.report.page import html_report
from popcompile.runtime.encoder import Encoder
from popcompile.runtime.pictures import read_picture
from popcompile.runtime.session import Runtime
from popcompile.runtime.verify import verify

PRUNED, WINDOW = [3, 4], 2  # of the package
#: about a.png, b.jpg and a.png
ASKED = ["w9 w10 w11 w12", "w20", "w30 w31"]


@pytest.fixture(scope="module")
def model(vision_checkpoint: Path) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(vision_checkpoint, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    a, b = save_pictures(tmp_path_factory.mktemp("pictures") / "files")
    return [a, b, a]


@pytest.fixture(scope="module")
def prompts(vision_package: Path, pictures: list[Path]) -> list[Prompt]:
    """The questions about the pictures, by transformers' processor."""
    processor, found = load_processor(vision_package), []
    for picture, question in zip(pictures, ASKED, strict=True):
        parts = [{"type": "image", "image": read_picture(str(picture))}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True,
            return_tensors="pt",
        )  # fmt: skip
        found.append(Prompt(inputs["input_ids"], {n: inputs[n] for n in ("pixel_values", "image_grid_thw")}))
    return found


def write_questions(file: Path, pictures: Sequence[Path], answers: Sequence[str | None]) -> Path:
    lines = [
        {"image": picture.name, "question": question} | ({"answer": answer} if answer else {})
        for picture, question, answer in zip(pictures, ASKED, answers, strict=True)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


# --- numbers ---------------------------------------------------------------------------------------------------


def predictions(model: PreTrainedModel, prompt: Prompt, after: Sequence[int], pruned: list[int]) -> Tensor:
    """Logits [tokens, vocabulary] that predict the tokens after a prompt."""
    given = given_of(model, prompt)
    logits, cache = pop_prefill(model, given, pruned, window=WINDOW)
    found = [logits[0]]
    for i, token in enumerate(after[:-1]):
        found.append(forward(model, next_token(model, token, prompt.ids.shape[1] + i, given), cache)[0])
    return torch.cat(found)


def greedy(model: PreTrainedModel, prompt: Prompt, pruned: list[int], count: int) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < count:
        tokens.append(int(predictions(model, prompt, [*tokens, 0], pruned)[-1].argmax()))
    return tokens


def words(tokens: Sequence[int]) -> str:
    return " ".join(f"w{token}" for token in tokens)


def test_every_number(
    model: PreTrainedModel, prompts: list[Prompt], pictures: list[Path], vision_package: Path, tmp_path: Path
) -> None:
    answers = [[40, 41, 42], [50, 51, 52], [60, 61, 62]]
    file = write_questions(tmp_path / "questions.jsonl", pictures, [words(answer) for answer in answers])
    result = evaluate_pictures(vision_package, pictures[0].parent, file, baselines=True)
    (metrics,) = result["texts"].values()
    full, pop = (
        [predictions(model, p, a, layers) for p, a in zip(prompts, answers, strict=True)] for layers in ([], PRUNED)
    )
    following = [torch.tensor(answer) for answer in answers]
    assert_metrics(metrics, metrics_of(full, pop, following))
    assert metrics["prompts"] == 3 and metrics["first_token_kl_mean"]["value"] > 0.01
    assert list(result["baselines"]) == ["none", "dropped"]
    (dropped,) = result["baselines"]["dropped"].values()
    assert dropped["first_token_kl_mean"]["value"] > metrics["first_token_kl_mean"]["value"]
    assert sorted(result["tokens"]) == sorted(prompt.ids.shape[1] for prompt in prompts)
    assert sorted(result["image_tokens"]) == [15, 15, 16] and result["pictures"] == 2


def test_answers(
    model: PreTrainedModel, prompts: list[Prompt], pictures: list[Path], vision_package: Path, tmp_path: Path
) -> None:
    """What the full model writes up to a token that ends texts, pruned and not; another answer; and a part of one."""
    package = Path(shutil.copytree(vision_package, tmp_path / "out"))
    written = [greedy(model, prompt, [], 3) for prompt in prompts]
    end = written[0][2]
    assert end not in written[0][:2], "take another question"
    (package / "generation_config.json").write_text(json.dumps({"eos_token_id": [end, 2]}))
    sign(package)
    given = [words(written[0][:2]), "w40 w41", words(written[2][:1])]
    file = write_questions(tmp_path / "questions.jsonl", pictures, given)
    found = evaluate_pictures(package, pictures[0].parent, file)["answers"]

    expected: dict[str, list[bool]] = {}
    for name, layers in (("reference", []), ("pop", PRUNED)):
        for prompt, answer in zip(prompts, given, strict=True):
            tokens = greedy(model, prompt, layers, 3)
            last = next((i for i, token in enumerate(tokens) if token in (end, 2)), 3)
            expected.setdefault(name, []).append(words(tokens[:last]) == answer)
    assert expected["reference"] == [True, False, False]
    assert found["prompts"] == 3
    for name, answered in expected.items():
        assert found["answered"][name]["value"] == sum(answered) / 3, name
    assert (found["kept"]["value"], found["kept"]["prompts"]) == (float(expected["pop"][0]), 1)


def test_answers_that_are_sampled(pictures: list[Path], vision_package: Path) -> None:
    """By a seed, from the full model, which is then less surprised than another is."""
    folder = pictures[0].parent
    results = [evaluate_pictures(vision_package, folder, seed=seed, continuation_tokens=8) for seed in (0, 0, 1)]
    first, again, other = (next(iter(result["texts"].values())) for result in results)
    assert first == again != other and first["prompts"] == 2 * len(QUESTIONS)
    assert 1 < first["full_perplexity"]["value"] < 96  # of 96 tokens
    assert "answers" not in results[0]
    single = evaluate_pictures(vision_package, folder, prompts=2, continuation_tokens=1)["texts"]
    assert all("continuation_kl_mean" not in metrics for metrics in single.values())


def test_questions_with_and_without_answers(pictures: list[Path], vision_package: Path, tmp_path: Path) -> None:
    file = write_questions(tmp_path / "questions.jsonl", pictures, ["w40", None, None])
    result = evaluate_pictures(vision_package, pictures[0].parent, file, continuation_tokens=4)
    assert result["answers"]["prompts"] == 1 and result["settings"]["questions"] == str(file)
    (metrics,) = result["texts"].values()
    assert metrics["prompts"] == 3


def test_the_package_as_its_own_reference(pictures: list[Path], vision_package: Path, tmp_path: Path) -> None:
    file = write_questions(tmp_path / "questions.jsonl", pictures, ["w40 w41", "w50 w51", "w60 w61"])
    alone = evaluate_pictures(vision_package, pictures[0].parent, file)
    result = evaluate_pictures(vision_package, pictures[0].parent, file, reference=vision_package)
    assert result["texts"] == alone["texts"]
    assert list(result["baselines"]) == ["none", "full"]
    assert f"against {vision_package}'s full model" in pictures_text(result)


def test_one_graph(pictures: list[Path], vision_package: Path, vision_checkpoint: Path, tmp_path: Path) -> None:
    """The unified layout, whose full model is compiled: numbers as of the split one, and it verifies."""
    options = {"layers": "3-4", "kv_projection": "layer", "window": WINDOW}
    convert(vision_checkpoint, tmp_path / "out", layout="unified", **options)
    assert len(verify(tmp_path / "out")) == 5
    file = write_questions(tmp_path / "questions.jsonl", pictures, ["w40 w41", "w50 w51", "w60 w61"])
    found, expected = (
        next(iter(evaluate_pictures(package, pictures[0].parent, file)["texts"].values()))
        for package in (tmp_path / "out", vision_package)
    )
    for name in ("first_token_kl_mean", "continuation_kl_mean", "perplexity_ratio"):
        assert found[name]["value"] == pytest.approx(expected[name]["value"], rel=1e-4)


def test_images_of_one_size(pictures: list[Path], gemma_vision_package: Path) -> None:
    result = evaluate_pictures(gemma_vision_package, pictures[0].parent, prompts=3, continuation_tokens=4)
    (metrics,) = result["texts"].values()
    assert result["image_tokens"] == [16] * 3 and metrics["first_token_kl_mean"]["value"] > 0.01


def test_what_is_written(vision_package: Path) -> None:
    """Up to a number of tokens, or to one of some."""
    encoder = Encoder(Runtime(vision_package), "decode")
    first, cache = encoder.encode(torch.arange(3, 20))
    tokens = iter([7, 8, 9])
    assert encoder.write(first, cache, 5, {9}, lambda logits: next(tokens)) == [7, 8, 9]
    assert cache.lengths == [19]  # the last one is not fed
    assert len(encoder.write(first, cache, 2, (), lambda logits: 7)) == 2


# --- which questions -------------------------------------------------------------------------------------------


def test_questions_about_any_picture(pictures: list[Path]) -> None:
    folder = pictures[0].parent
    found = picture_questions(folder, None, 100, seed=0)
    assert len({(q.picture, q.question) for q in found}) == len(found) == 2 * len(QUESTIONS)
    assert {q.picture for q in found[:2]} == set(pictures)
    assert picture_questions(folder, None, 3, seed=0) == found[:3]
    assert {q.picture for seed in range(8) for q in picture_questions(folder, None, 1, seed)} == set(pictures)


def test_some_of_many_questions(pictures: list[Path], tmp_path: Path) -> None:
    file = write_questions(tmp_path / "questions.jsonl", pictures, [None] * 3)
    folder = pictures[0].parent
    assert len(picture_questions(folder, file, 2, seed=0)) == 2
    found = picture_questions(folder, file, 9, seed=0)
    assert sorted(q.question for q in found) == sorted(ASKED) and found[0].picture.parent == folder


# --- what a user sees ------------------------------------------------------------------------------------------


def test_what_is_saved_is_shown(cli: Cli, vision_package: Path, pictures: list[Path], tmp_path: Path) -> None:
    package = Path(shutil.copytree(vision_package, tmp_path / "out"))
    command = f"popcompile evaluate {package} --images DIR --save"
    assert f"quality with images not measured; `{command}`" in shown(cli, package) and command in html_report(package)
    file = write_questions(tmp_path / "questions.jsonl", pictures, ["w40", "w50", "w60"])
    arguments = ("--images", pictures[0].parent, "--questions", file, "--save", "--json")
    status, out, err = cli.run("evaluate", package, *arguments)
    assert (status, err) == (0, "")
    result = json.loads(out)
    assert json.loads((package / REPORT).read_text())["evaluation_images"] == result
    text = shown(cli, package)
    assert "quality with images first-token KL" in text and "answered exactly: 0.000" in text
    lengths = f"{min(result['tokens'])} to {max(result['tokens'])} tokens, 15 to 16 of them a picture's"
    assert f"- measured on 3 questions about 2 pictures: prompts of {lengths}" in text
    assert f"quality not measured; `popcompile evaluate {package} --save` measures it" in text
    page = html_report(package)
    assert "3 questions about 2 pictures" in page and "answered exactly" in page
    assert "image_quality" not in json.loads(cli.run("inspect", package, "--json")[1])["not_measured"]


def shown(cli: Cli, package: Path) -> str:
    return " ".join(cli.run("inspect", package)[1].split())


def test_what_a_user_types(vision_package: Path, pictures: list[Path]) -> None:
    """A process of its own: no warnings, no progress, one document."""
    before = snapshot(vision_package)
    arguments = ("--images", pictures[0].parent, "--prompts", 1, "--continuation-tokens", 2)
    done = popcompile("evaluate", vision_package, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 question about 1 picture: " in done.stdout and "first token, KL mean (nats)" in done.stdout
    assert snapshot(vision_package) == before
