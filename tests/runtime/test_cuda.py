"""The CUDA provider's side of packages, as far as that can be seen without a GPU (fake_gpu.py): that ONNX Runtime has
kernels for every operator, that their host code takes the shapes, that nothing comes back to the host in between, and
that sessions share the weights. Numbers need a GPU: examples/bench_shapes.py.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import fake_gpu
import onnx
import onnx_ir
import pytest
import torch
from conftest import tiny_gemma3, tiny_llama, tiny_model, tiny_moe
from forks import COMMANDS, Forks
from image_attention_reference import gemma3
from vision_reference import random_model

from popcompile import convert
from popcompile.export.onnx_graph import to_onnx
from popcompile.export.providers import PROVIDERS
from popcompile.export.weights import write_weights
from popcompile.frontend.tracing import trace
from popcompile.package.manifest import read_manifest
from popcompile.passes import PassManager, canonicalization, lowering, pruning

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
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """Processes that find the GPU."""
    environment = fake_gpu.build(tmp_path_factory.mktemp("fake-gpu"))
    with Forks([*COMMANDS, "popcompile.runtime.generation"], environment) as forks:
        yield forks


@pytest.fixture(scope="module", params=PACKAGES)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    tiny_model(CONFIGS[request.param.partition("-")[0]]).save_pretrained(folder / "model")
    options = {"layers": "1", "kv_projection": "layer", "provider": "cuda"} | PACKAGES[request.param]
    convert(folder / "model", folder / "out", **options)
    return folder / "out"


SCRIPT = Path(__file__).parents[1] / "support" / "on_fake_gpu.py"


def run(forks: Forks, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """on_fake_gpu.py."""
    done = forks.script(SCRIPT, *arguments, **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_operators_have_kernels(compiled: Path, forks: Forks) -> None:
    done = run(forks, "place", compiled)
    operators = placed(done.stderr)
    assert operators["CPUExecutionProvider"] <= SHAPES
    assert "GroupQueryAttention" in operators["CUDAExecutionProvider"]
    assert "MemcpyToHost" not in operators["CUDAExecutionProvider"]
    assert done.stderr.count("Using user supplied initializer") == int(done.stdout)


def placed(log: str) -> dict[str, set[str]]:
    """The operators that each provider computes, from what ONNX Runtime logs of it."""
    places = re.split(r"Node\(s\) placed on \[(\w+)\]", log)[1:]
    found: dict[str, set[str]] = {}
    for provider, text in zip(places[::2], places[1::2], strict=True):
        found.setdefault(provider, set()).update(re.findall(r"VerifyEachNodeIsAssignedToAnEp\]\s+(\w+) \(", text))
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_to_images_has_kernels(dtype: torch.dtype, forks: Forks, tmp_path: Path) -> None:
    """How many images there are is known on the GPU alone, so some numbers come back to the host."""
    program, weights = trace(gemma3(3), dtype), random_model(gemma3(3)).to(dtype).state_dict()
    PassManager([*canonicalization(), *pruning((1,), window=4), *lowering()]).run(program)
    models = to_onnx(program, ["prefill"], "cuda")
    write_weights(tmp_path / "weights.data", models, program, weights.__getitem__)
    onnx_ir.save(models["prefill"], tmp_path / "prefill.onnx")
    operators = placed(run(forks, "open", tmp_path / "prefill.onnx").stderr)
    assert operators["CPUExecutionProvider"] <= SHAPES
    assert {"MultiHeadAttention", "Loop", "ScatterND", "NonZero", "CumSum"} <= operators["CUDAExecutionProvider"]


@pytest.mark.parametrize(("keys", "taken"), [(64, True), (65, False), (66, False)])
def test_attention_with_a_bias_asks_for_a_number_of_keys(keys: int, taken: bool, forks: Forks, tmp_path: Path) -> None:
    """Which is why Provider.key_multiple is 8."""
    assert PROVIDERS["cuda"].key_multiple == 8
    cast = "".join(f"{name}16 = Cast <to = 10> ({name}) " for name in ("query", "key", "value", "bias"))
    model = onnx.parser.parse_model(f"""
        <ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        attention (
            float[1,24,32] query, float[1,2,{keys},16] key, float[1,2,{keys},16] value, float[1,1,24,{keys}] bias
        ) => (float[1,24,32] out) {{
            {cast}
            out16 = com.microsoft.MultiHeadAttention <num_heads = 2> (query16, key16, value16, , , bias16)
            out = Cast <to = 1> (out16)
        }}""")
    onnx.save(model, tmp_path / "attention.onnx")
    done = run(forks, "run", tmp_path / "attention.onnx")
    assert done.stdout == ("[[1, 24, 32]]\n" if taken else "refused\n")
    assert ("attn_bias is not correctly aligned" in done.stderr) != taken


def test_numbers_of_tokens(compiled: Path, forks: Forks) -> None:
    """The host's integers reach the GPU as they are: last places of prompt and window, and the tokens before."""
    log = run(forks, "count", compiled, FAKE_GPU_LOG="1").stderr
    runs = re.findall(r"^run \d+ (\d+) (\d+)$(.*?)^end$", log, re.MULTILINE | re.DOTALL)
    assert len(runs) == 3
    window = read_manifest(compiled).window
    for tokens, past, copies in runs:
        copied = {int(number) for number in re.findall(r"^copied (-?\d+)$", copies, re.MULTILINE)}
        last = min(window, int(tokens)) - 1
        assert {int(tokens) - 1, int(past)} <= copied <= {int(tokens) - 1, last, int(past), 0, 1}


def test_answers(compiled: Path, forks: Forks) -> None:
    shapes = json.loads(run(forks, "answer", compiled).stdout.splitlines()[-1])
    assert shapes[:3] == [[1, 15], [1, 24], [3, 13]]
    assert shapes[3:] in ([], [[1, 15], [1, 12, 64]])


def test_genai(compiled: Path, forks: Forks) -> None:
    assert run(forks, "genai", compiled).stdout.split() == ["15"]


@pytest.mark.parametrize("compiled", ["llama-fp16"], indirect=True)
def test_verify_sees_that_nothing_computes(compiled: Path, forks: Forks) -> None:
    done = forks.popcompile("verify", compiled, "--provider", "cuda")
    assert done.returncode == 2
    assert done.stderr.startswith(f"popcompile: error: {compiled}: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize("compiled", ["llama-fp16"], indirect=True)
def test_bench(compiled: Path, forks: Forks) -> None:
    few = ("--lengths", "8", "--decode-tokens", "2", "--repeats", "1", "--batch", "2", "--json")
    done = forks.popcompile("bench", compiled, "--provider", "cuda", *few)
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout)
    assert result["gpu"] == "fake_gpu.c"
    weights = (compiled / read_manifest(compiled).weights).stat().st_size
    assert [subject["name"] for subject in result["subjects"]] == ["pop", "full"]
    assert all(subject["memory"]["gpu"] >= weights for subject in result["subjects"])
