"""`popcompile verify` of a package that takes images: what is damaged is found, also where every hash is right."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from bad_input import Cli, refusal
from onnx import GraphProto, helper, numpy_helper
from resign import sign

from popcompile.package.image_inputs import ImageInputs
from popcompile.package.manifest import read_manifest
from popcompile.runtime.noise import make_pixels, make_prompt
from popcompile.runtime.session import Runtime
from popcompile.runtime.verify import verify

MERGER = "merger"
TABLE = "model.language_model.embed_tokens.weight"


@pytest.fixture
def package(vision_package: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(vision_package, tmp_path / "out"))


# --- ways to damage it -----------------------------------------------------------------------------------------


def edit(package: Path, file: str, change: Callable[[GraphProto], None]) -> None:
    model = onnx.load(package / file, load_external_data=False)
    change(model.graph)
    (package / file).write_bytes(model.SerializeToString())


def fill(package: Path, file: str, name: str, value: float) -> None:
    """Overwrite those of a graph's weights whose names have `name` in them."""
    graph = onnx.load(package / file, load_external_data=False).graph
    found = [{e.key: e.value for e in t.external_data} for t in graph.initializer if name in t.name]
    assert found
    with open(package / read_manifest(package).weights, "r+b") as weights:
        for place in found:
            weights.seek(int(place["offset"]))
            weights.write(np.full(int(place["length"]) // 4, value, np.float32).tobytes())


def swap(package: Path, one: str, other: str) -> None:
    first, second = (package / one).read_bytes(), (package / other).read_bytes()
    (package / one).write_bytes(second)
    (package / other).write_bytes(first)


def mix_frames(graph: GraphProto) -> None:
    """All patches of a call attend to each other, and not only those of an image."""
    shape = next(node for node in graph.node if node.output[0] == "/Concat_1_output_0")
    hidden = next(node for node in graph.node if node.op_type == "MultiHeadAttention")
    assert hidden.input[0] == "/Reshape_8_output_0" and len(shape.input) == 3
    graph.initializer.append(numpy_helper.from_array(np.array([1, -1], np.int64), "one frame"))
    shape.input[:] = ["one frame", shape.input[2]]


def leave_images_out(graph: GraphProto) -> None:
    """Image tokens are embedded as text is."""
    (scatter,) = (node for node in graph.node if node.op_type == "ScatterND")
    graph.node.append(helper.make_node("Identity", [scatter.input[0]], ["inputs_embeds"]))
    graph.node.remove(scatter)


def swap_norms(graph: GraphProto) -> None:
    """Of queries and keys, in one layer of one graph."""
    query, key = (
        next(t for t in graph.initializer if t.name == f"model.language_model.layers.3.self_attn.{name}_norm.weight")
        for name in ("q", "k")
    )
    query.name, key.name = key.name, query.name


#: how, and what the line says
DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "NaN in the tower": (
        lambda p: fill(p, "vision.onnx", MERGER, np.nan), "vision.onnx: computes NaN or infinity on cpu",
    ),
    "a tower of zeros": (
        lambda p: fill(p, "vision.onnx", MERGER, 0), "vision.onnx: gives unlike images the same features",
    ),
    "infinity in the embedding": (
        lambda p: fill(p, "embedding.onnx", TABLE, np.inf), "the graphs compute NaN or infinity on cpu",
    ),
    "graphs swapped": (
        lambda p: swap(p, "vision.onnx", "embedding.onnx"), "vision.onnx: has other inputs or outputs than",
    ),
    "images mixed": (
        lambda p: edit(p, "vision.onnx", mix_frames), "of the largest value where another is beside it",
    ),
    "images left out": (
        lambda p: edit(p, "embedding.onnx", leave_images_out), "embedding.onnx leaves images out of prompts",
    ),
    "another decoder": (lambda p: edit(p, "decode.onnx", swap_norms), "prefill and decode disagree on cpu by"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_that_no_hash_shows(damage: str, package: Path) -> None:
    change, words = DAMAGE[damage]
    change(package)
    sign(package)
    assert words in refusal(lambda: verify(package))


@pytest.mark.parametrize(("file", "name"), [("vision.onnx", MERGER), ("embedding.onnx", TABLE)])
def test_a_damaged_weight(file: str, name: str, package: Path, cli: Cli) -> None:
    fill(package, file, name, 0.5)
    assert "is not the file that this package was made with" in cli.refuses("verify", package)


def test_text_that_is_embedded_in_two_ways(unified_vision_package: Path, tmp_path: Path) -> None:
    def fill_with_ones(graph: GraphProto) -> None:
        """What stands behind a token's embedding is no zero."""
        (pad,) = (node for node in graph.node if node.op_type == "Pad")
        value = next(tensor for tensor in graph.initializer if tensor.name == pad.input[2])
        value.CopyFrom(numpy_helper.from_array(np.array(1, np.float32), value.name))

    package = Path(shutil.copytree(unified_vision_package, tmp_path / "out"))
    edit(package, "embed_tokens.onnx", fill_with_ones)
    sign(package)
    assert "embed_tokens.onnx embeds text otherwise than embedding.onnx" in refusal(lambda: verify(package))


def test_other_tokens_than_the_manifest_says(package: Path) -> None:
    """Of four times as many patches."""
    sign(package, vision=read_manifest(package).vision | {"merge": 4})
    assert "gives features [48, 192] of images that have 12 tokens and 192 columns" in refusal(lambda: verify(package))


def test_a_context_without_room_for_an_image(package: Path) -> None:
    sign(package, context_length=11)
    assert "images have 10 tokens, and the context has 11; convert again" in refusal(lambda: verify(package))
    sign(package, context_length=12)
    assert len(verify(package)) == 5


@pytest.mark.parametrize("features", [0, 1 << 20])
def test_pixels_of_no_processor(features: int, package: Path) -> None:
    def change(graph: GraphProto) -> None:
        graph.input[0].type.tensor_type.shape.dim[1].dim_value = features

    edit(package, "vision.onnx", change)
    sign(package)
    assert "vision.onnx: has pixel_values that no processor makes" in refusal(lambda: verify(package))


# --- what is whole ---------------------------------------------------------------------------------------------


def test_what_is_checked(vision_package: Path, cli: Cli) -> None:
    status, out, err = cli.run("verify", vision_package)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[1] for line in lines] == ["files:", "graphs:", "configs:", "images:", "numbers:"]
    assert lines[3].startswith("ok  images: an image of 6 or 10 tokens has the same features alone and beside another")


def test_images_of_one_size(gemma_vision_package: Path) -> None:
    """Which see all of themselves, and so must lie whole before the tokens that are encoded again."""
    checks = {check["check"]: check["detail"] for check in verify(gemma_vision_package)}
    assert checks["images"].startswith("an image of 16 tokens has the same features") and "numbers" in checks


def test_noise(vision_package: Path) -> None:
    """The images of a size that was asked for, and a prompt with them whose text has no image's token by chance."""
    runtime = Runtime(vision_package)
    inputs = runtime.manifest.images
    assert inputs is not None
    pixels, grids = make_pixels(runtime, [(2, 3), (1, 5)], seed=0)
    assert grids is not None and grids.tolist() == [[1, 4, 6], [1, 2, 10]]
    assert torch.equal(pixels, make_pixels(runtime, [(2, 3), (1, 5)], seed=0)[0])
    assert runtime.encode_images(pixels, grids).shape == (11, inputs.width)
    image, video = inputs.tokens["image"], inputs.tokens["video"]
    ids, places = make_prompt(inputs, torch.tensor([image, 7, video, 8]), [(2, 3), (1, 5)])
    assert ids.tolist() == [0, *[image] * 6, 7, *[image] * 5, 0, 8]
    assert [(p.begin, p.rows, p.columns) for p in places] == [(1, 2, 3), (8, 1, 5)]
    ids, places = make_prompt(inputs, torch.tensor([7]), [(2, 3), (1, 5)])
    assert ids.tolist() == [7, *[image] * 11] and [place.begin for place in places] == [1, 7]


def test_a_prompt_of_images_of_one_size() -> None:
    """A row of tokens, as of Gemma-3; 0 is taken."""
    inputs = ImageInputs({"image": 0}, ["pixel_values"], 65, merge=0, tokens_per_image=4, axes=0)
    ids, places = make_prompt(inputs, torch.tensor([5, 0]), [(1, 4)])
    assert ids.tolist() == [5, 0, 0, 0, 0, 1] and (places[0].begin, places[0].columns) == (1, 4)
