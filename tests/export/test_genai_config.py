"""genai_config.json of families whose configs lack a field, and what models of images have beside it.

What genai does with them is in test_genai.py and test_genai_images.py.
"""

from __future__ import annotations

from typing import Any

import pytest
from transformers import CodeGenConfig, GenerationConfig, LlamaConfig, PretrainedConfig
from vision import IMAGE, START, VIDEO, tiny_gemma3_vision, tiny_qwen3_vl

from popcompile.export.genai_config import genai_config
from popcompile.export.genai_images import genai_processor
from popcompile.package.image_inputs import ImageInputs

SIZES = {"head_size": 16, "kv_heads": 2, "vocab_size": 96}
#: of either layout
GRAPHS = [
    {"prefill": "model.onnx", "vision": "vision.onnx", "embedding": "embedding.onnx"},
    {"prefill": "prefill.onnx", "decode": "decode.onnx", "vision": "vision.onnx", "embedding": "embedding.onnx"},
]
OF_GRIDS = ImageInputs(
    {"image": IMAGE, "video": VIDEO}, ["pixel_values", "image_grid_thw"], width=192, merge=2, tokens_per_image=0, axes=3
)
OF_ONE_SIZE = ImageInputs({"image": 100}, ["pixel_values"], width=65, merge=0, tokens_per_image=16, axes=0)
SETTINGS: dict[str, Any] = {
    "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.5, 0, 0.25], "image_std": [0.5, 1, 0.25], "patch_size": 4, "temporal_patch_size": 2,
    "merge_size": 2, "size": {"shortest_edge": 64, "longest_edge": 4096},
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "generation", "tokens"),
    [
        (CodeGenConfig(), {}, {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": 50256}),
        (LlamaConfig(pad_token_id=7), {}, {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 7}),
        (LlamaConfig(), {"eos_token_id": [5, 6]}, {"bos_token_id": 1, "eos_token_id": [5, 6], "pad_token_id": 5}),
        (LlamaConfig(bos_token_id=None, eos_token_id=None), {}, {"pad_token_id": 0}),
    ],
    ids=["no pad_token_id in the config", "the config's", "generation's", "none"],
)
def test_special_tokens(config: PretrainedConfig, generation: dict[str, Any], tokens: dict[str, Any]) -> None:
    sizes = {"head_size": 8, "kv_heads": 2, "vocab_size": 64}
    graphs = {"prefill": "model.onnx"}
    model = genai_config(config, GenerationConfig(**generation), graphs=graphs, provider="cpu", **sizes)["model"]
    assert {name: value for name, value in model.items() if name.endswith("token_id")} == tokens


@pytest.mark.parametrize("graphs", GRAPHS, ids=["unified", "split"])
def test_grids(graphs: dict[str, str]) -> None:
    """Positions of three axes, and no token that pads: it may stand in a prompt."""
    generation = GenerationConfig(pad_token_id=0, eos_token_id=2)
    model = genai_config(tiny_qwen3_vl(), generation, graphs=graphs, provider="cpu", images=OF_GRIDS, **SIZES)["model"]
    decoder = model["decoder"]
    assert (model["type"], model["context_length"], decoder["hidden_size"]) == ("qwen3_vl", 256, 192)
    assert decoder["filename"] == graphs["prefill"] and "pipeline" not in decoder
    assert list(decoder["inputs"])[:3] == ["inputs_embeds", "attention_mask", "position_ids"]
    assert {name: value for name, value in model.items() if name.endswith("token_id")} == {
        "eos_token_id": 2, "pad_token_id": -1, "image_token_id": IMAGE, "video_token_id": VIDEO,
        "vision_start_token_id": START,
    }  # fmt: skip
    assert model["vision"]["spatial_merge_size"] == 2
    assert list(model["vision"]["inputs"]) == ["pixel_values", "image_grid_thw"]


def test_one_size() -> None:
    """Positions are slots, which genai counts by itself."""
    options = {"graphs": GRAPHS[0], "provider": "cpu", "images": OF_ONE_SIZE, **SIZES}
    model = genai_config(tiny_gemma3_vision(), GenerationConfig(pad_token_id=0), **options)["model"]
    assert (model["type"], model["decoder"]["hidden_size"], model["pad_token_id"]) == ("gemma3", 65, 0)
    assert list(model["decoder"]["inputs"])[:2] == ["inputs_embeds", "attention_mask"]
    assert "position_ids" not in model["decoder"]["inputs"]
    assert list(model["vision"]["inputs"]) == ["pixel_values"] and "spatial_merge_size" not in model["vision"]


def operations(settings: dict[str, Any], images: ImageInputs) -> dict[str, Any]:
    """Attributes by kind, in order."""
    found = genai_processor(settings, images)
    assert found is not None
    steps = [step["operation"] for step in found["processor"]["transforms"]]
    return {step["type"]: step["attrs"] for step in steps}


def test_processor_of_grids() -> None:
    found = operations(SETTINGS, OF_GRIDS)
    assert list(found) == ["DecodeImage", "Resize", "Rescale", "Normalize", "PatchImage"]
    assert (found["Resize"]["min_pixels"], found["Resize"]["max_pixels"]) == (64, 4096)
    assert found["PatchImage"] == {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}
    # onnxruntime-extensions takes a list whose first number is an integer for one of integers
    assert all(type(value) is float for name in ("mean", "std") for value in found["Normalize"][name])
    assert list(operations(SETTINGS | {"do_resize": False, "do_normalize": False}, OF_GRIDS)) == [
        "DecodeImage", "Rescale", "PatchImage",
    ]  # fmt: skip
    assert operations(SETTINGS | {"do_rescale": False}, OF_GRIDS)["Rescale"] == {"rescale_factor": 1.0}


def test_processor_of_one_size() -> None:
    found = operations(SETTINGS | {"size": {"height": 32, "width": 48}, "resample": 2}, OF_ONE_SIZE)
    assert list(found) == ["DecodeImage", "Resize", "Rescale", "Normalize", "Permute3D"]
    assert found["Resize"] == {"interpolation": "LINEAR", "height": 32, "width": 48, "keep_aspect_ratio": 0}


@pytest.mark.parametrize(
    "changes",
    [
        {"resample": 4},
        {"size": {"height": 32, "width": 32}},
        {"size": None},
        {"image_mean": 0.5},
        {"image_std": [0.5]},
        {"rescale_factor": None},
        {"do_pan_and_scan": True},
    ],
    ids=str,
)
def test_processors_that_genai_has_no_operations_for(changes: dict[str, Any]) -> None:
    assert genai_processor(SETTINGS | changes, OF_GRIDS) is None
