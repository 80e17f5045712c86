"""Tiny vision-language models, and the ONNX graphs of their vision towers and embeddings with the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from random_weights import randomize
from transformers import AutoModelForImageTextToText, Gemma3Config, PreTrainedConfig, Qwen3VLConfig

from popcompile.export.onnx_graph import images_to_onnx
from popcompile.export.weights import write_weights
from popcompile.passes import PassManager, image_lowering
from popcompile.vision.tracing import build_model, trace_images

_TEXT = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
}  # fmt: skip
#: of Qwen3-VL; Gemma-3's image token below is beyond its vocabulary
IMAGE, VIDEO, START, END = 90, 91, 92, 93
MERGE, PATCH_FEATURES = 2, 3 * 2 * 4 * 4


def tiny_qwen3_vl() -> Qwen3VLConfig:
    """Three blocks, DeepStack after the first two, position embeddings of 6 x 6 places."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {
        "depth": 3, "hidden_size": 48, "intermediate_size": 80, "num_heads": 4, "patch_size": 4,
        "spatial_merge_size": MERGE, "temporal_patch_size": 2, "out_hidden_size": 64, "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
    }  # fmt: skip
    return Qwen3VLConfig(
        text_config=_TEXT | {"rope_parameters": rope}, vision_config=vision, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=START, vision_end_token_id=END, tie_word_embeddings=True,
    )  # fmt: skip


def tiny_gemma3_vision(image_token: int = 100) -> Gemma3Config:
    """Three layers of SigLIP over 8 x 8 patches, of which an image has 16 tokens."""
    vision = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32,
        "patch_size": 4, "vision_use_head": False,
    }  # fmt: skip
    text = _TEXT | {"sliding_window": 8}
    return Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=16, image_token_id=image_token, boi_token_id=94,
        eoi_token_id=95,
    )  # fmt: skip


def random_model(config: PreTrainedConfig) -> Any:
    """transformers' own module with random weights, large enough that features show a wrong layer."""
    torch.manual_seed(0)
    return randomize(AutoModelForImageTextToText.from_config(config).eval(), 0.2)


class Graphs:
    """A model's graphs around the decoder in ONNX Runtime, made from its config, and then its weights."""

    def __init__(self, model: Any, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.folder = folder
        self.program = trace_images(build_model(model.config, dtype))
        PassManager(image_lowering()).run(self.program)
        self.models = images_to_onnx(self.program, "cpu")
        write_weights(folder / "weights.data", self.models, self.program, model.state_dict().__getitem__)
        for name, onnx_model in self.models.items():
            ir.save(onnx_model, folder / f"{name}.onnx")
        providers = ["CPUExecutionProvider"]
        self.vision, self.embedding, self.text_embedding = (
            ort.InferenceSession(folder / f"{name}.onnx", providers=providers)
            for name in ("vision", "embedding", "text_embedding")
        )

    def features(self, pixel_values: torch.Tensor, grids: torch.Tensor | None = None) -> np.ndarray:
        """Of one call."""
        inputs = {"pixel_values": pixel_values.numpy()} | ({} if grids is None else {"image_grid_thw": grids.numpy()})
        return np.asarray(self.vision.run(None, inputs)[0])

    def embeddings(self, ids: torch.Tensor, features: np.ndarray) -> np.ndarray:
        return np.asarray(self.embedding.run(None, {"input_ids": ids.numpy(), "image_features": features})[0])


def patches(grids: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Random pixels of images or videos, [patches, PATCH_FEATURES]."""
    count = int(grids.prod(dim=1).sum())
    return torch.randn(count, PATCH_FEATURES, generator=torch.Generator().manual_seed(seed))


def side_by_side(outputs: Any) -> torch.Tensor:
    """What transformers' get_image_features returns for Qwen3-VL, as the vision graph does: [tokens, (1 + D) * H]."""
    parts = [outputs.pooler_output, *outputs.deepstack_features]
    return torch.cat([torch.cat(list(part)) for part in parts], dim=1)


def close(found: np.ndarray, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    """Whether all numbers differ by at most a fraction of the largest one, which is what fp32 promises of sums."""
    assert found.shape == tuple(expected.shape)
    return bool(np.abs(found - expected.numpy()).max() <= tolerance * expected.abs().max().item())


# --- fixtures, which conftest.py registers ---------------------------------------------------------------------


@pytest.fixture(scope="session")
def qwen_vl() -> Any:
    """A model of tiny_qwen3_vl."""
    return random_model(tiny_qwen3_vl())


@pytest.fixture(scope="session")
def gemma_vl() -> Any:
    """A model of tiny_gemma3_vision."""
    return random_model(tiny_gemma3_vision())


@pytest.fixture(scope="session")
def qwen_vl_graphs(qwen_vl: Any, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    return Graphs(qwen_vl, tmp_path_factory.mktemp("qwen_vl"))


@pytest.fixture(scope="session")
def gemma_vl_graphs(gemma_vl: Any, tmp_path_factory: pytest.TempPathFactory) -> Graphs:
    return Graphs(gemma_vl, tmp_path_factory.mktemp("gemma_vl"))
