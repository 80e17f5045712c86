"""Manifests and graphs of vision-language packages with values that nobody has exported, and hashes that are right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
from bad_input import refusal
from resign import sign

from popcompile.package.compatibility import runtimes
from popcompile.package.graph_check import read_graphs
from popcompile.package.manifest import MANIFEST, read_manifest

OTHER = "has other fields than those of images"
FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "one field": ({"axes": None, "merge": None}, OTHER),
    "one more": ({"code": "x"}, OTHER),
    "no width": ({"width": 0}, "field vision has a wrong width"),
    "a width in words": ({"width": "192"}, "field vision has a wrong width"),
    "axes": ({"axes": 9}, "field vision has a wrong axes"),
    "a negative merge": ({"merge": -2}, "field vision has a wrong merge"),
    "other kinds": ({"tokens": {"sound": 1}}, "tokens of other kinds than image and video"),
    "no kinds": ({"tokens": {}}, "tokens of other kinds"),
    "tokens in words": ({"tokens": {"image": "90"}}, "field vision has tokens that are none"),
    "other inputs": ({"inputs": ["input_ids"]}, "field vision has other inputs than those of images"),
    "no sizes": ({"merge": 0}, "does not say how many tokens an image has"),
    "two sizes": ({"tokens_per_image": 16}, "does not say how many tokens an image has"),
    "no positions": ({"axes": 0}, "field inputs has other names"),
}


@pytest.fixture
def package(vision_package: Path, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(vision_package, tmp_path / "out"))


@pytest.mark.parametrize("case", FIELDS)
def test_fields(case: str, package: Path) -> None:
    changes, line = FIELDS[case]
    vision = json.loads((package / MANIFEST).read_text())["vision"] | changes
    sign(package, vision={name: value for name, value in vision.items() if value is not None})
    assert line in refusal(lambda: read_manifest(package))


def test_a_package_of_text_has_no_other_graphs(package: Path) -> None:
    sign(package, vision={})
    assert "field graphs has other graphs than decode and prefill" in refusal(lambda: read_manifest(package))


GRAPHS: dict[str, tuple[str, str, str]] = {
    "a narrow embedding": ("embedding.onnx", "inputs_embeds", "is not [batch, tokens, 192]"),
    "narrow features": ("vision.onnx", "image_features", "is not [tokens, 192]"),
    "narrow tokens": ("decode.onnx", "inputs_embeds", "is not [batch, tokens, 192] of the cache's type"),
    "two positions": ("prefill.onnx", "position_ids", "is not [3, batch, tokens] of int64"),
    "grids of two": ("vision.onnx", "image_grid_thw", "is not [images, 3] of int64"),
    "flat pixels": ("vision.onnx", "pixel_values", "has pixel_values that no processor makes"),
}


@pytest.mark.parametrize("case", GRAPHS)
def test_inputs_and_outputs(case: str, package: Path) -> None:
    file, name, line = GRAPHS[case]
    model = onnx.load(package / file, load_external_data=False)
    value = next(v for v in (*model.graph.input, *model.graph.output) if v.name == name)
    dims = value.type.tensor_type.shape.dim
    if name == "pixel_values":
        del dims[1:]
    else:
        fixed = [dim for dim in dims if dim.dim_value]
        fixed[-1].dim_value = 2
    onnx.save(model, package / file)
    sign(package)
    assert line in refusal(lambda: read_graphs(package, read_manifest(package)))


def test_graphs_in_each_others_places(package: Path) -> None:
    content = (package / "vision.onnx").read_bytes()
    (package / "vision.onnx").write_bytes((package / "embedding.onnx").read_bytes())
    (package / "embedding.onnx").write_bytes(content)
    sign(package)
    assert "has other inputs or outputs" in refusal(lambda: read_graphs(package, read_manifest(package)))


def test_manifests_from_before_transformers_js(unified_vision_package: Path, tmp_path: Path) -> None:
    """Without a graph that embeds text alone, and under other names."""
    package = Path(shutil.copytree(unified_vision_package, tmp_path / "out"))
    (package / "embed_tokens.onnx").unlink()
    (package / "vision_encoder.onnx").rename(package / "vision.onnx")
    graphs = read_manifest(unified_vision_package).graphs | {"vision": "vision.onnx"}
    del graphs["text_embedding"]
    sign(package, graphs=graphs)
    read_graphs(package, manifest := read_manifest(package))
    assert not next(found for found in runtimes(manifest) if found.runtime == "transformers.js").loads


def test_older_manifests_have_no_images(tiny_package: Path, tmp_path: Path) -> None:
    package = Path(shutil.copytree(tiny_package, tmp_path / "out"))
    sign(package, format_version=3)
    assert read_manifest(package).images is None
