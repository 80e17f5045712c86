"""onnxruntime-genai answers questions about pictures with a vision-language package as it is, as our own runtime does.

Its inputs are tensors, or what its own processor makes of picture files, which is compared with transformers'.
"""

from __future__ import annotations

import json
import string
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerFast
from vision_checkpoint import MARKS, PROCESSOR, draw_picture, save_vision_checkpoint, vision_model
from vision_reference import IMAGE, Part, Prompt, Visual, make_prompt

import popcompile
from popcompile.package.compatibility import runtimes
from popcompile.package.manifest import read_manifest
from popcompile.runtime.generation import PopForCausalLM

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai has no wheel for this platform")

NEW_TOKENS = 8
SMALL, WIDE, TALL = Visual(4, 4), Visual(4, 6), Visual(8, 4)
#: first turns
PROMPTS: dict[str, list[Part]] = {
    "text": [9],
    "an image": [3, WIDE, 5],
    "two equal": [3, SMALL, 2, SMALL, 4],
    "two of different size": [2, WIDE, 3, TALL, 4],
    "image first": [WIDE, 5],
    "image last": [4, WIDE],
    "adjacent": [2, SMALL, WIDE, 3],
}
SECOND = [5, 17, 33, 8]  # a turn of text
QUESTION = "what is it?"
SEEN = "<|vision_start|><|image_pad|><|vision_end|>"
#: of 255 levels of a colour, in units of pixels that are normalized
LEVEL = 1 / 255 / PROCESSOR["image_std"][0]

#: in a process of its own: genai brings its own onnxruntime. A job is tensors, or a text and pictures; and later turns
GENERATE = """
import json, sys
import numpy as np
import onnxruntime_genai as og
folder, jobs, new_tokens = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
model = og.Model(folder)
for job in jobs:
    if "text" in job:
        pictures = og.Images.open(*job["pictures"]) if job["pictures"] else None
        inputs = model.create_multimodal_processor()(job["text"], images=pictures)
        np.savez(job["tensors"], **{name: inputs[name].as_numpy() for name in inputs.keys()})
    else:
        inputs = og.NamedTensors()
        for name, value in np.load(job["tensors"]).items():
            inputs[name] = value
    length = inputs["input_ids"].as_numpy().shape[1] + new_tokens + sum(len(t) + new_tokens for t in job["later"])
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=length, min_length=length)
    generator, found = og.Generator(model, params), []
    generator.set_inputs(inputs)
    for turn in [None, *job["later"]]:
        if turn is not None:  # the token that was generated last is not in the cache
            generator.rewind_to(len(generator.get_sequence(0)) - 1)
            generator.append_tokens(np.array([found[-1][-1], *turn], np.int32))
        for _ in range(new_tokens):
            generator.generate_next_token()
        found.append(generator.get_sequence(0)[-new_tokens:].tolist())
    print(json.dumps(found))
"""


def genai(package: Path, jobs: Sequence[dict[str, Any]]) -> list[list[list[int]]]:
    """New tokens of each job, turn by turn."""
    command = [sys.executable, "-c", GENERATE, str(package), json.dumps(jobs), str(NEW_TOKENS)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def ours(model: PopForCausalLM, ids: Tensor, pixels: dict[str, Tensor], later: Sequence[list[int]]) -> list[list[int]]:
    """New tokens, turn by turn."""
    cache, found = None, []
    for turn in [[], *later]:
        ids = torch.cat((ids, torch.tensor([turn], dtype=ids.dtype)), 1)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **pixels,
        )  # fmt: skip
        ids, cache = output.sequences, output.past_key_values
        found.append(ids[0, -NEW_TOKENS:].tolist())
    return found


def test_same_greedy_tokens(vision_package: Path, tmp_path: Path) -> None:
    """Then a turn of text, whose positions fall behind its slots by what images save.

    In the last prompt stand the tokens that end and that pad texts, which is where genai would hide them.
    """
    prompts = [make_prompt(parts, seed=3) for parts in PROMPTS.values()]
    marked = make_prompt(PROMPTS["an image"], seed=4)
    marked.ids[0, [1, -3]] = torch.tensor([0, 2])
    require_same_tokens(vision_package, [*prompts, marked], tmp_path)


def test_a_quantized_package(vision_checkpoint: Path, tmp_path: Path) -> None:
    """Whose embedding reads the LM head's table, in blocks."""
    out = tmp_path / "out"
    popcompile.convert(vision_checkpoint, out, layers="3-4", kv_projection="layer", window=2, dtype="int8")
    require_same_tokens(
        out, [make_prompt(PROMPTS[name], seed=3) for name in ("text", "two of different size")], tmp_path
    )


def require_same_tokens(package: Path, prompts: Sequence[Prompt], folder: Path) -> None:
    """In two turns, of which the first is one of the prompts."""
    jobs = []
    for i, prompt in enumerate(prompts):
        tensors = {"input_ids": prompt.ids.int().numpy(), **{k: v.numpy() for k, v in prompt.pixels.items()}}
        if prompt.pixels:
            tensors["num_image_tokens"] = (prompt.ids == IMAGE).sum(1).numpy()
        np.savez(folder / f"{i}.npz", **tensors)
        jobs.append({"tensors": str(folder / f"{i}.npz"), "later": [SECOND]})
    with popcompile.load(package, prefill="pop") as model:
        expected = [ours(model, prompt.ids, prompt.pixels, [SECOND]) for prompt in prompts]
    assert genai(package, jobs) == expected


# --- genai's own processor -------------------------------------------------------------------------------------


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each small letter and a few signs, in bytes, which genai's tokenizer takes and words not."""
    signs = ["<pad>", "<bos>", "<eos>", *string.ascii_lowercase, "Ġ", "?"]
    letters = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)} | MARKS, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.add_special_tokens([*signs[:3], *MARKS])
    return PreTrainedTokenizerFast(
        tokenizer_object=letters,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template="{{ messages }}",
    )


@pytest.fixture(scope="module")
def unified_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer that genai has, and the unified layout."""
    folder = tmp_path_factory.mktemp("unified")
    letter_tokenizer().save_pretrained(save_vision_checkpoint(vision_model(), folder / "model"))
    options = {"layers": "3-4", "kv_projection": "layer", "window": 2, "layout": "unified"}
    popcompile.convert(folder / "model", folder / "out", **options)
    return folder / "out"


@dataclass
class Processed:
    """What genai's processor makes of a question about pictures, and the tokens that genai answers; and ours."""

    tensors: dict[str, np.ndarray]
    answer: list[int]
    expected: dict[str, np.ndarray]
    expected_answer: list[int]

    @property
    def difference(self) -> float:
        """The largest one between pixels, in levels of 255."""
        return float(np.abs(self.tensors["pixel_values"] - self.expected["pixel_values"]).max()) / LEVEL


def processed(package: Path, folder: Path, questions: Sequence[Sequence[Path]]) -> list[Processed]:
    """Each question is about some pictures."""
    processor, tokenizer = AutoImageProcessor.from_pretrained(package), AutoTokenizer.from_pretrained(package)
    files = [folder / f"{i}.npz" for i in range(len(questions))]
    jobs = [
        {"text": SEEN * len(q) + QUESTION, "pictures": [str(p) for p in q], "tensors": str(file), "later": []}
        for q, file in zip(questions, files, strict=True)
    ]
    found = []
    with popcompile.load(package, prefill="pop") as model:
        for job, file, (answer,) in zip(jobs, files, genai(package, jobs), strict=True):
            pictures = [Image.open(picture).convert("RGB") for picture in job["pictures"]]
            pixels = processor(pictures, return_tensors="pt").data if pictures else {}
            text, pad = job["text"], "<|image_pad|>"
            for grid in pixels.get("image_grid_thw", []):
                text = text.replace(pad, "<image>" * int(grid.prod() // PROCESSOR["merge_size"] ** 2), 1)
            ids = tokenizer(text.replace("<image>", pad), return_tensors="pt")["input_ids"]
            expected = {"input_ids": ids.numpy(), **{name: value.numpy() for name, value in pixels.items()}}
            found.append(Processed(dict(np.load(file)), answer, expected, ours(model, ids, pixels, [])[0]))
    return found


def test_pictures_from_files(unified_package: Path, tmp_path: Path) -> None:
    """Enlarged, reduced and as they are; two of different size, which genai pads in between; and none."""
    sizes = [(64, 64), (32, 16), (10, 12), (144, 40)]
    pictures = [draw_picture(tmp_path / f"{w}-{h}.png", w, h) for w, h in sizes]
    questions = [*([picture] for picture in pictures), [pictures[0]] * 2, [pictures[3], pictures[2]], []]
    *alone, equal, different, none = processed(unified_package, tmp_path, questions)
    for case in [*alone, equal]:
        assert case.tensors["image_grid_thw"].tolist() == case.expected["image_grid_thw"].tolist()
        assert case.difference < 1e-3  # the same bytes, of which floats are made in another order
    for case in [*alone, equal, different, none]:
        assert case.tensors["input_ids"].tolist() == case.expected["input_ids"].tolist()
        assert case.answer == case.expected_answer


def test_where_pixels_differ(unified_package: Path, tmp_path: Path) -> None:
    """By another decoder of JPEG, which shows where colours have half the resolution; and by the side resized first.

    genai resizes across first. Pillow does by its release, and rounds to bytes in between.
    """
    names = ("whole.jpg", "smooth.jpg", "halved.jpg", "tall.png", "across.png")
    whole, smooth, halved, tall, across = files = [tmp_path / name for name in names]
    ramp = Image.linear_gradient("L").resize((32, 32))
    Image.merge("RGB", [ramp, ramp.rotate(90), ramp.rotate(180)]).save(smooth, quality=90, subsampling=2)
    noise(32, 32).save(halved, quality=90, subsampling=2)
    noise(32, 32).save(whole, quality=90, subsampling=0)
    noise(17, 39).save(tall)
    noise(17, 39).resize((16, 39), Image.Resampling.BICUBIC).save(across)
    found = processed(unified_package, tmp_path, [[file] for file in files])
    for case, levels in zip(found, (1.5, 8, 140, 16, 1e-3), strict=True):
        assert case.difference < levels
    assert np.array_equal(found[3].tensors["pixel_values"], found[4].tensors["pixel_values"])


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_what_loads_is_said(vision_package: Path, unified_package: Path) -> None:
    for package, graph in ((vision_package, "prefill.onnx"), (unified_package, "decoder_model_merged.onnx")):
        known = {found.runtime: found for found in runtimes(read_manifest(package))}
        assert known["onnxruntime-genai"].loads and known["onnxruntime-genai"].note.startswith(f"{graph} alone")
        assert not known["optimum"].loads and known["transformers.js"].loads == (package == unified_package)


def test_where_sizes_differ(unified_package: Path, tmp_path: Path) -> None:
    """40 pixels are 2.5 tokens of 16: genai rounds a half up, and Python to the even number."""
    (case,) = processed(unified_package, tmp_path, [[draw_picture(tmp_path / "a.png", 16, 40)]])
    assert case.tensors["image_grid_thw"].tolist() == [[1, 6, 2]]
    assert case.expected["image_grid_thw"].tolist() == [[1, 4, 2]]
