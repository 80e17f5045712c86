"""Examples give popcompile's tokens: one that knows ONNX Runtime alone, and one of transformers.js, with pictures.

examples/clients/check.py does the same for all clients of text.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from npm import npm_packages
from transformers import AutoTokenizer
from vision_checkpoint import draw_picture

from popcompile import convert, load, load_processor
from popcompile.runtime.pictures import read_picture

EXAMPLES = Path(__file__).parents[2] / "examples" / "clients"
PROMPTS = ["The capital of France is", "A B-tree is a self-balancing tree data structure. " * 24]
NEW_TOKENS = 24
TRANSFORMERS_JS = "@huggingface/transformers@4.3.2"


def printed(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "long"])
@pytest.mark.parametrize("layout", ["smollm2_package", pytest.param("unified_package", marks=pytest.mark.real)])
def test_onnxruntime_loop(layout: str, prompt: str, request: pytest.FixtureRequest) -> None:
    package: Path = request.getfixturevalue(layout)
    found = printed([sys.executable, str(EXAMPLES / "onnxruntime_loop.py"), str(package), prompt, str(NEW_TOKENS)])
    ids = AutoTokenizer.from_pretrained(package)(prompt, return_tensors="pt")["input_ids"]
    length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    expected = load(package, prefill="pop").generate(ids, **length, do_sample=False)
    assert torch.tensor(json.loads(found)).equal(expected[0, ids.shape[1] :])


# --- transformers.js, with pictures ----------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Where Node finds the packages that it imports."""
    (tmp_path / "node_modules").symlink_to(npm_packages("transformers.js", TRANSFORMERS_JS) / "node_modules")
    return Path(shutil.copy(EXAMPLES / "transformersjs_images.mjs", tmp_path))


@pytest.fixture(scope="module")
def unified_gemma_package(gemma_vision_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unified") / "gemma"
    convert(gemma_vision_checkpoint, out, layers="1,3", kv_projection="layer", window=6, layout="unified")
    return out


def expected_answer(package: Path, question: str, pictures: list[Path]) -> str:
    """What popcompile says."""
    processor, content = load_processor(package), [{"type": "text", "text": question}]
    seen = [{"type": "image", "image": read_picture(str(picture))} for picture in pictures]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": seen + content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    with load(package, prefill="pop") as model:
        answer = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(answer[0], skip_special_tokens=True))


@pytest.mark.real
@pytest.mark.slow  # the first time npm brings 475 MB
@pytest.mark.skipif(not shutil.which("npm"), reason="needs Node.js")
@pytest.mark.parametrize(
    ("layout", "sizes"), [("unified_vision_package", [(32, 32), (48, 32)]), ("unified_gemma_package", [(32, 32)])]
)
def test_transformersjs_images(
    layout: str, sizes: list[tuple[int, int]], script: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """About pictures that are not scaled, each followed by words, and about none."""
    package: Path = request.getfixturevalue(layout)
    pictures = [draw_picture(tmp_path / f"{width}-{height}.png", width, height) for width, height in sizes]
    asked = [[], *([picture] for picture in pictures)]
    question = " ".join(f"w{i}" for i in range(20, 32))
    expected = [expected_answer(package, question, seen) for seen in asked]
    command = ["node", str(script), str(package), question, str(NEW_TOKENS)]
    assert [json.loads(printed([*command, *map(str, seen)])) for seen in asked] == expected
    assert len(set(expected)) == len(asked), "the pictures are seen"
