"""The runtime on real packages, against transformers' own modules; its memory, and what it refuses to load."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import TOLERANCE, Pair, assert_same_cache, tolerance
from reference import full_cache, pop_prefill

import popcompile.runtime.providers
import popcompile.runtime.session
from popcompile.errors import PopcompileError
from popcompile.runtime.generation import load
from popcompile.runtime.session import Runtime

# --- one call --------------------------------------------------------------------------------------------------

LENGTHS = [("smollm2", n) for n in (1, 2, 17, 300)]
LENGTHS += [pytest.param("gemma", n, marks=pytest.mark.real) for n in (1, 2, 17, 300, 700)]


@pytest.mark.parametrize(("name", "length"), LENGTHS)
def test_full_model_is_transformers(name: str, length: int, request: pytest.FixtureRequest) -> None:
    """Logits of every token and the cache; then nine more tokens, then one, after that past."""
    pair: Pair = request.getfixturevalue(name)
    expected, cache = full_cache(pair.reference), None
    for new in (length, 9, 1):
        ids = pair.tokens(new, seed=new)
        output = pair.model(ids, past_key_values=cache)
        cache = output.past_key_values
        with torch.no_grad():
            logits = pair.reference(ids, past_key_values=expected).logits
        assert output.logits.shape == logits.shape
        assert (output.logits - logits).abs().max() < tolerance(logits)
        assert_same_cache(cache, expected)


@pytest.mark.parametrize(("name", "length"), LENGTHS)
def test_pop_prefill_is_the_reference(name: str, length: int, request: pytest.FixtureRequest) -> None:
    """A prompt, then a second turn's prompt after it, both pruned; then a token of the full model."""
    pair: Pair = request.getfixturevalue(name)
    first, second, last = pair.tokens(length), pair.tokens(9, seed=1), pair.tokens(1, seed=2)
    output = pair.model(first, prefill="pop")
    logits, expected = pop_prefill(pair.reference, first, pair.pruned, window=pair.window)
    assert output.logits.shape == logits.shape == (1, 1, pair.model.manifest.vocab_size)
    assert (output.logits - logits).abs().max() < TOLERANCE
    assert_same_cache(output.past_key_values, expected)
    for ids in (second, last):
        output = pair.model(ids, past_key_values=output.past_key_values, prefill="pop")
        logits, expected = pop_prefill(pair.reference, ids, pair.pruned, expected, window=pair.window)
        assert (output.logits - logits).abs().max() < TOLERANCE
        assert_same_cache(output.past_key_values, expected)


@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_logits_stand_where_the_tokens_are(smollm2: Pair, side: str) -> None:
    lengths, width = (3, 11, 1), 11
    mask = torch.zeros(len(lengths), width, dtype=torch.int64)
    for row, length in enumerate(lengths):
        columns = {
            "left": range(width - length, width),
            "right": range(length),
            "holes": sorted(torch.randperm(width, generator=torch.Generator().manual_seed(row))[:length].tolist()),
        }[side]
        mask[row, list(columns)] = 1
    ids = torch.randint(5, 40_000, mask.shape, generator=torch.Generator().manual_seed(0)).masked_fill(mask == 0, -100)
    output = smollm2.model(ids, mask)
    last = smollm2.model(ids, mask, logits_to_keep=1)
    for row, length in enumerate(lengths):
        alone = smollm2.model(ids[row, mask[row] == 1][None]).logits[0]
        assert (output.logits[row, mask[row] == 1] - alone).abs().max() < TOLERANCE
        assert not output.logits[row, mask[row] == 0].any()
        assert (last.logits[row] - alone[-1:]).abs().max() < TOLERANCE
        assert output.past_key_values.kv.lengths[row] == length


def test_long_full_prefill_in_pieces(smollm2: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only the last logits are asked for, those of all tokens are never in memory at once."""
    ids, mask = smollm2.tokens(100).view(2, 50), torch.ones(2, 50, dtype=torch.int64)
    mask[0, :13] = 0
    whole = smollm2.model(ids, mask, logits_to_keep=1)
    monkeypatch.setattr(popcompile.runtime.session, "_LOGITS_BYTES", 20 * 49152 * 4)
    pieces = smollm2.model(ids, mask, logits_to_keep=1)
    assert (whole.logits - pieces.logits).abs().max() < TOLERANCE
    assert pieces.past_key_values.kv.lengths == [37, 50]
    for one, other in zip(whole.past_key_values.kv.tensors(), pieces.past_key_values.kv.tensors(), strict=True):
        assert (one[0, :, :37] - other[0, :, :37]).abs().max() < TOLERANCE
        assert (one[1] - other[1]).abs().max() < TOLERANCE


def test_use_cache(smollm2: Pair) -> None:
    ids = smollm2.tokens(5)
    assert smollm2.model(ids, use_cache=False).past_key_values is None
    assert isinstance(smollm2.model(ids, return_dict=False), tuple)
    arguments: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
    without = smollm2.model.generate(ids, use_cache=False, prefill="pop", **arguments)
    with_cache = smollm2.model.generate(ids, prefill="pop", **arguments)
    assert without.past_key_values is None
    assert torch.equal(without.sequences, with_cache.sequences)


# --- memory ----------------------------------------------------------------------------------------------------


def anonymous_bytes() -> int:
    """Memory of this process that is not a file's."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no Anonymous in smaps_rollup")


def resident_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS in status")


needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads Linux's /proc")


@needs_proc
@pytest.mark.parametrize("low_memory", [True, False])
def test_second_session_adds_no_weights(low_memory: bool, smollm2: Pair) -> None:
    """The graph that is opened second reads the mapped file, also where the first one packed its matrices."""
    runtime = Runtime(smollm2.package, low_memory=low_memory)
    ids = [smollm2.tokens(20)[0]]
    runtime.feed(ids, runtime.new_cache(1), "prefill")
    before = anonymous_bytes()
    runtime.feed(ids, runtime.new_cache(1), "decode")
    weights = (smollm2.package / smollm2.model.manifest.weights).stat().st_size
    assert anonymous_bytes() - before < 0.1 * weights


@needs_proc
def test_weights_are_packed_once(smollm2: Pair) -> None:
    """Prompts and tokens are branches of one session, which read the same. In a process that has freed nothing yet."""
    code = (
        "import sys, torch; from pathlib import Path; from test_runtime import Runtime, anonymous_bytes\n"
        "before = anonymous_bytes(); runtime = Runtime(Path(sys.argv[1])); cache = runtime.new_cache(1)\n"
        "for length in (20, 1): runtime.feed([torch.arange(5, 5 + length)], cache, 'prefill')\n"
        "print(anonymous_bytes() - before)"
    )
    command = [sys.executable, "-c", code, str(smollm2.package)]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=300, check=True)
    weights = (smollm2.package / smollm2.model.manifest.weights).stat().st_size
    assert 0.7 * weights < int(done.stdout) < 1.2 * weights


@needs_proc
def test_low_memory_holds_one_copy(smollm2: Pair) -> None:
    """Weights stay pages of the file: what the process allocates is for activations and 100 tokens' cache."""
    weights = (smollm2.package / smollm2.model.manifest.weights).stat().st_size
    before = anonymous_bytes()
    model = load(smollm2.package, low_memory=True)
    ids = smollm2.tokens(100)
    expected = smollm2.model.generate(ids, max_new_tokens=8, do_sample=False, prefill="pop")
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, prefill="pop"), expected)
    assert anonymous_bytes() - before < 0.2 * weights


# --- loading ---------------------------------------------------------------------------------------------------


@pytest.fixture
def changed(smollm2: Pair, tmp_path: Path) -> Path:
    """A copy of the package whose files may be changed; the weights are linked."""
    folder = tmp_path / "package"
    shutil.copytree(smollm2.package, folder, ignore=shutil.ignore_patterns("*.data"))
    (folder / "weights.onnx.data").symlink_to(smollm2.package / "weights.onnx.data")
    return folder


def test_load_checks_the_package(changed: Path, tmp_path: Path) -> None:
    with pytest.raises(PopcompileError, match="no such package folder"):
        load(tmp_path / "nothing")
    (changed / "decode.onnx").write_bytes((changed / "prefill.onnx").read_bytes())
    with pytest.raises(PopcompileError, match=r"decode\.onnx is not the file"):
        load(changed)
    (changed / "decode.onnx").unlink()
    with pytest.raises(PopcompileError, match=r"decode\.onnx is missing"):
        load(changed)


def test_load_checks_config(changed: Path) -> None:
    config = json.loads((changed / "config.json").read_text())
    text = json.dumps(config | {"model_type": "no-such-type"})
    size = (changed / "config.json").stat().st_size
    (changed / "config.json").write_text(text)
    assert len(text) != size
    with pytest.raises(PopcompileError, match=r"config\.json"):
        load(changed)


def test_providers(smollm2: Pair, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(PopcompileError, match="provider tpu: unknown; choose one of cpu, cuda"):
        load(smollm2.package, provider="tpu")
    with pytest.raises(PopcompileError, match="prefill fast: unknown"):
        load(smollm2.package, prefill="fast")
    monkeypatch.setattr(popcompile.runtime.providers.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(PopcompileError, match="has no CUDAExecutionProvider"):
        load(smollm2.package, provider="cuda")
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(popcompile.runtime.gpu.has_gpu(), reason="says what happens without a GPU")
def test_cuda_without_a_gpu(smollm2: Pair, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """One line, and nothing of ONNX Runtime's own on stdout or stderr."""
    if "CUDAExecutionProvider" not in popcompile.runtime.providers.ort.get_available_providers():
        pytest.skip("this onnxruntime is built without CUDA")
    with pytest.raises(PopcompileError, match="no NVIDIA GPU"):
        load(smollm2.package, provider="cuda")
    monkeypatch.setattr(popcompile.runtime.providers, "has_gpu", lambda: True)  # as with a GPU, but no CUDA libraries
    with pytest.raises(PopcompileError, match="cannot use it"):
        load(smollm2.package, provider="cuda")
    assert capfd.readouterr() == ("", "")


def test_a_loaded_package_says_what_it_is_and_closes(tiny_package: Path) -> None:
    with popcompile.load(tiny_package, prefill="pop") as model:
        shown = repr(model)
        assert str(tiny_package) in shown and "llama: 1 of 2 layers skipped in prefill" in shown
        assert "fp32 on cpu" in shown and "prefill 'pop'" in shown
        before = model.generate(torch.tensor([[5, 9, 12]]), max_new_tokens=2)
    assert before.shape == (1, 5)
    with pytest.raises(PopcompileError, match="was closed; load it again"):
        model.generate(torch.tensor([[5, 9, 12]]), max_new_tokens=2)
