"""OpenVINO GenAI and llama.cpp as subjects of a benchmark: in fp32 their tokens are the full model's."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from compare_peers import subject
from filelock import FileLock
from peer_models.builds import PEERS, build, builds_folder

from popcompile.bench.measure import bench
from popcompile.frontend.samples import cache_folder
from popcompile.package.manifest import read_manifest

LENGTH, STEPS = 40, 8


@pytest.mark.real
@pytest.mark.slow  # the first time each installs some 2 GB, and builds for a minute or two
@pytest.mark.parametrize(
    "name",
    [
        "openvino-all-f32",
        pytest.param("llama.cpp", marks=pytest.mark.skipif(not shutil.which("npm"), reason="needs Node.js")),
    ],
)
def test_the_same_tokens(name: str, smollm2_checkpoint: Path, smollm2_package: Path) -> None:
    (peer,) = (peer for peer in PEERS if peer.name == name)
    work = cache_folder() / "peers"
    work.mkdir(exist_ok=True)
    with FileLock(work / "lock"):
        built = build(peer, "fp32", smollm2_checkpoint, builds_folder(work, smollm2_checkpoint))
    assert built
    vocabulary = read_manifest(smollm2_package).vocab_size
    theirs = subject(built, vocabulary, LENGTH + STEPS + 1)
    result = bench(smollm2_package, [theirs], [LENGTH], decode_tokens=STEPS, repeats=1)
    _, full, found = result["subjects"]
    assert found["lengths"][0]["continuation"] == full["lengths"][0]["continuation"]
    assert found["runtime"].startswith(name.partition("-")[0]) and not result["warnings"]
