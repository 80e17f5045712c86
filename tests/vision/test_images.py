"""Images of unlike sizes through one vision graph: as many calls as sizes, and features in the images' order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from vision import (
    MERGE,
    PATCH_FEATURES,
    Graphs,
    close,
    patches,
    random_model,
    side_by_side,
    tiny_gemma3_vision,
)

from popcompile.errors import PopcompileError
from popcompile.runtime.images import encode_grids, encode_images

SIZES = [[1, 4, 6], [1, 8, 4], [1, 4, 6], [2, 4, 6], [1, 2, 2], [1, 8, 4], [1, 6, 4]]


class Counted:
    """A session whose calls are remembered."""

    def __init__(self, session: Any) -> None:
        self.session, self.grids = session, list[Any]()

    def run(self, outputs: Any, inputs: dict[str, Any]) -> Any:
        self.grids.append(inputs["image_grid_thw"].tolist())
        return self.session.run(outputs, inputs)


@torch.no_grad()
def test_one_call_for_each_size(qwen_vl: Any, qwen_vl_graphs: Graphs) -> None:
    grids = torch.tensor(SIZES)
    pixels, session = patches(grids), Counted(qwen_vl_graphs.vision)
    found = encode_grids(session, pixels.numpy(), grids.numpy(), MERGE)
    assert close(found, side_by_side(qwen_vl.model.get_image_features(pixels, grids, return_dict=True)))
    assert [len(call) for call in session.grids] == [3, 2, 1, 1]


def test_calls_are_no_larger_than_asked_for(qwen_vl_graphs: Graphs) -> None:
    grids = torch.tensor([[1, 4, 4]] * 5 + [[1, 8, 8]])
    pixels, session = patches(grids), Counted(qwen_vl_graphs.vision)
    whole = encode_grids(qwen_vl_graphs.vision, pixels.numpy(), grids.numpy(), MERGE)
    found = encode_grids(session, pixels.numpy(), grids.numpy(), MERGE, most=32)
    assert [len(call) for call in session.grids] == [2, 2, 1, 1]
    assert close(found, torch.tensor(whole))


@torch.no_grad()
def test_gemma(tmp_path: Any) -> None:
    model = random_model(tiny_gemma3_vision())
    pixels = torch.randn(2, 3, 32, 32)
    found = encode_images(Graphs(model, tmp_path).vision, pixels.numpy())
    assert close(found[:, :-1], model.model.get_image_features(pixels).pooler_output.flatten(0, 1))


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([[1, 4, 4]], "pixel_values has 24 patches and image_grid_thw 16"),
        ([[1, 3, 8]], "rows and columns that 2 divides"),
        ([[1, 4, 6], [0, 4, 4]], "give frames"),
        ([[1, -4, -6]], "give frames"),
        ([1, 4, 6], "has shape"),
        ([], "has shape"),
        ([[1.0, 4.0, 6.0]], "whole numbers"),
    ],
)
def test_what_does_not_fit_is_refused(qwen_vl_graphs: Graphs, grids: Any, message: str) -> None:
    pixels = np.zeros((24, PATCH_FEATURES), np.float32)
    with pytest.raises(PopcompileError, match=message):
        encode_grids(qwen_vl_graphs.vision, pixels, np.array(grids), MERGE)
