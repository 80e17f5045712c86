"""The CUDA provider's side of packages, as far as that can be seen without a GPU (fake_gpu.py): that ONNX Runtime has
kernels for every operator, that their host code takes the shapes, that nothing comes back to the host in between, and
that sessions share the weights. Numbers need a GPU: examples/bench_shapes.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import fake_gpu
import pytest
from conftest import tiny_gemma3, tiny_llama, tiny_model, tiny_moe

from popcompile import convert
from popcompile.package.manifest import read_manifest

#: as on a Mac, whose onnxruntime has no CUDA provider to run; an ONNX Runtime for another CUDA fails
pytestmark = pytest.mark.skipif(fake_gpu.why_not() is not None, reason=str(fake_gpu.why_not()))

#: what ONNX Runtime computes on the CPU for any provider, for it is about shapes
SHAPES = {"Add", "Cast", "Concat", "Equal", "Expand", "Min", "Mul", "Reshape", "Squeeze", "Sub"}
CONFIGS = {"llama": tiny_llama(num_hidden_layers=3), "gemma3": tiny_gemma3(), "moe": tiny_moe()}
PACKAGES = {
    "llama-fp16": {},
    "llama-int4": {"dtype": "int4", "layout": "unified"},
    "gemma3-bf16": {"dtype": "bf16"},
    "moe-fp16": {"layout": "unified"},
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return fake_gpu.build(tmp_path_factory.mktemp("fake-gpu"))


@pytest.fixture(scope="module", params=PACKAGES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(CONFIGS[request.param.partition("-")[0]]).save_pretrained(folder / "model")
    options = {"layers": "1", "kv_projection": "layer", "provider": "cuda"} | PACKAGES[request.param]
    convert(folder / "model", folder / "out", **options)
    return folder / "out"


def run(environment: dict[str, str], *command: str | Path) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, *map(str, command)]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


SCRIPT = Path(__file__).parents[1] / "support" / "on_fake_gpu.py"


def test_operators_have_kernels(compiled: Path, environment: dict[str, str]) -> None:
    done = run(environment, SCRIPT, "place", compiled)
    places = re.split(r"Node\(s\) placed on \[(\w+)\]", done.stderr)[1:]
    operators = {
        provider: set(re.findall(r"VerifyEachNodeIsAssignedToAnEp\]\s+(\w+) \(", text))
        for provider, text in zip(places[::2], places[1::2], strict=True)
    }
    assert operators["CPUExecutionProvider"] <= SHAPES
    assert "GroupQueryAttention" in operators["CUDAExecutionProvider"]
    assert "MemcpyToHost" not in operators["CUDAExecutionProvider"]
    assert done.stderr.count("Using user supplied initializer") == int(done.stdout)


def test_numbers_of_tokens(compiled: Path, environment: dict[str, str]) -> None:
    """The host's integers reach the GPU as they are: last places of prompt and window, and the tokens before."""
    log = run(environment | {"FAKE_GPU_LOG": "1"}, SCRIPT, "count", compiled).stderr
    runs = re.findall(r"^run \d+ (\d+) (\d+)$(.*?)^end$", log, re.MULTILINE | re.DOTALL)
    assert len(runs) == 3
    window = read_manifest(compiled).window
    for tokens, past, copies in runs:
        copied = {int(number) for number in re.findall(r"^copied (-?\d+)$", copies, re.MULTILINE)}
        last = min(window, int(tokens)) - 1
        assert {int(tokens) - 1, int(past)} <= copied <= {int(tokens) - 1, last, int(past), 0, 1}


def test_answers(compiled: Path, environment: dict[str, str]) -> None:
    shapes = json.loads(run(environment, SCRIPT, "answer", compiled).stdout.splitlines()[-1])
    assert shapes[:3] == [[1, 15], [1, 24], [3, 13]]
    assert shapes[3:] in ([], [[1, 15], [1, 12, 64]])


def test_genai(compiled: Path, environment: dict[str, str]) -> None:
    assert run(environment, SCRIPT, "genai", compiled).stdout.split() == ["15"]


@pytest.mark.parametrize("compiled", ["llama-fp16"], indirect=True)
def test_verify_sees_that_nothing_computes(compiled: Path, environment: dict[str, str]) -> None:
    command = [sys.executable, "-m", "popcompile.cli", "verify", str(compiled), "--provider", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"popcompile: error: {compiled}: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("compiled", ["llama-fp16"], indirect=True)
def test_bench(compiled: Path, environment: dict[str, str]) -> None:
    few = ("--lengths", "8", "--decode-tokens", "2", "--repeats", "1", "--batch", "2", "--json")
    done = run(environment, "-m", "popcompile.cli", "bench", compiled, "--provider", "cuda", *few)
    result = json.loads(done.stdout)
    assert result["gpu"] == "fake_gpu.c"
    weights = (compiled / read_manifest(compiled).weights).stat().st_size
    assert [subject["name"] for subject in result["subjects"]] == ["pop", "full"]
    assert all(subject["memory"]["gpu"] >= weights for subject in result["subjects"])
