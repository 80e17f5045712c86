"""`popcompile bench` on tiny models: what it reports, that all subjects compute the same, and what it leaves."""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from bad_input import Cli, popcompile, save_model, snapshot
from peers import VOCABULARY, genai_folder, mean_decoder_tokens, save_mean_decoder

from popcompile.bench.measure import bench
from popcompile.bench.memory import AnonymousPeak, anonymous_bytes
from popcompile.bench.onnx_decoder import read_decoder
from popcompile.bench.runners import GenaiRunner, OnnxRunner, PackageRunner, Runner
from popcompile.bench.subjects import find_peers, package_subject
from popcompile.conversion import convert
from popcompile.errors import PopcompileError
from popcompile.package.manifest import REPORT
from popcompile.report.bench import bench_text
from popcompile.report.plots import write_prefill_plot
from popcompile.runtime.generation import load
from popcompile.variants import Variants

GENAI = importlib.util.find_spec("onnxruntime_genai") is not None
LENGTHS, STEPS, REPEATS = [8, 24], 5, 3
SMALL = ["--lengths", "8", "--decode-tokens", "2", "--repeats", "1"]


@pytest.fixture(scope="module")
def peer(tiny_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return genai_folder(tiny_package, tmp_path_factory.mktemp("peers") / "genai")


@pytest.fixture(scope="module")
def unpruned(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny package's model, converted with nothing pruned."""
    out = tmp_path_factory.mktemp("packages") / "unpruned"
    convert(tiny_checkpoint, out, prune=0)
    return out


@pytest.fixture(scope="module")
def result(tiny_package: Path, peer: Path, unpruned: Path) -> dict[str, Any]:
    """As a user gets it: one document, nothing else printed, nothing changed on disk."""
    folders = (tiny_package, peer, unpruned)
    before = [snapshot(folder) for folder in folders]
    numbers = ["--lengths", "8,24", "--decode-tokens", STEPS, "--repeats", REPEATS, "--threads", "1", "--seed", "3"]
    done = popcompile("bench", tiny_package, "--against", peer, unpruned, *numbers, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert [snapshot(folder) for folder in folders] == before
    return json.loads(done.stdout)


def subjects(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {subject["name"]: subject for subject in result["subjects"]}


# --- the report ------------------------------------------------------------------------------------------------


def test_subjects(result: dict[str, Any], peer: Path, unpruned: Path) -> None:
    genai = [f"{peer} (genai)"] if GENAI else []
    assert list(subjects(result)) == ["pop", "full", str(peer), *genai, str(unpruned)]
    assert [s["kind"] for s in result["subjects"]] == ["package", "package", "onnx", *["genai"] * len(genai), "package"]


def test_times(result: dict[str, Any]) -> None:
    tokens = {"prefill": LENGTHS, "time_to_first_token": LENGTHS, "decode": [STEPS] * 2}
    for subject in result["subjects"]:
        assert [row["tokens"] for row in subject["lengths"]] == LENGTHS
        for name in ("prefill", "time_to_first_token", "decode"):
            for row, count in zip(subject["lengths"], tokens[name], strict=True):
                seconds = row[name]["seconds"]
                assert len(seconds) == REPEATS and min(seconds) > 0
                assert row[name]["median"] == statistics.median(seconds)
                assert row[name]["half_spread"] == (max(seconds) - min(seconds)) / 2
                assert row[name]["tokens_per_second"] == pytest.approx(count / row[name]["median"])
        for row in subject["lengths"]:
            for prefill, first in zip(row["prefill"]["seconds"], row["time_to_first_token"]["seconds"], strict=True):
                assert prefill < first
        assert subject["load_seconds"] > 0


def test_ratios(result: dict[str, Any]) -> None:
    found = subjects(result)
    others = list(found)[1:]
    assert [(r["over"], r["tokens"]) for r in result["ratios"]] == [(o, n) for o in others for n in LENGTHS]
    for ratio in result["ratios"]:
        index = LENGTHS.index(ratio["tokens"])
        for name in ("prefill", "time_to_first_token", "decode"):
            medians = [found[subject]["lengths"][index][name]["median"] for subject in (ratio["over"], "pop")]
            assert ratio[name] == medians[0] / medians[1]


def test_first_tokens(result: dict[str, Any]) -> None:
    """Every subject but pop is the same model."""
    first = {name: [row["first_token"] for row in s["lengths"]] for name, s in subjects(result).items()}
    assert all(tokens == first["full"] for name, tokens in first.items() if name != "pop")
    assert all(len(row) == 1 and 0 <= row[0] < 128 for row in first["full"])


def test_memory(result: dict[str, Any]) -> None:
    for subject in result["subjects"]:
        memory = subject["memory"]
        if anonymous_bytes() is not None:
            assert 10e6 < memory["anonymous"] < memory["peak"] < 4e9


def test_what_it_ran_on(result: dict[str, Any], tiny_package: Path) -> None:
    assert (result["package"], result["pruned"], result["dtype"]) == (str(tiny_package), [1], "fp32")
    settings = {"lengths": LENGTHS, "batch": 1, "decode_tokens": STEPS, "repeats": REPEATS, "threads": 1}
    assert result["settings"] == settings | {"provider": "cpu", "runtime": "popcompile", "seed": 3, "images": []}
    names = {"popcompile", "onnxruntime", "onnxruntime_genai", "transformers", "torch", "python"}
    assert set(result["versions"]) == names
    assert result["versions"]["popcompile"] and result["versions"]["onnxruntime"]
    assert (result["versions"]["onnxruntime_genai"] is not None) == GENAI
    assert result["cpu"] and result["warnings"] == []


def test_table(result: dict[str, Any], peer: Path) -> None:
    lines = bench_text(result).splitlines()
    ratio = next(r for r in result["ratios"] if r["over"] == str(peer) and r["tokens"] == 24)
    (row,) = [line for line in lines if line.split()[:2] == ["24", str(peer)] and "(genai)" not in line]
    assert f"{ratio['prefill']:.2f}x" in row and f"{ratio['time_to_first_token']:.2f}x" in row
    assert "prefill skips 1 of 2 layers" in lines[0] and "threads: 1" in lines[1]


def test_plot(result: dict[str, Any], peer: Path, tmp_path: Path) -> None:
    for suffix in (".svg", ".png"):
        write_prefill_plot(tmp_path / f"plot{suffix}", result)
    svg = (tmp_path / "plot.svg").read_text()
    assert all(f">{name}<" in svg for name in ("pop", "full", str(peer), "prefill (ms)", "prompt (tokens)"))
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_command_without_json(cli: Cli, tiny_package: Path, tmp_path: Path) -> None:
    status, out, err = cli.run("bench", tiny_package, *SMALL, "--batch", "2", "--plot", tmp_path / "plot.svg")
    assert (status, err) == (0, "")
    assert "2 rows" in out and " pop " in out and " full " in out
    assert (tmp_path / "plot.svg").is_file()


def test_a_saved_benchmark_stands_in_the_report(cli: Cli, tiny_package: Path, tmp_path: Path) -> None:
    package = Path(shutil.copytree(tiny_package, tmp_path / "package"))
    status, out, err = cli.run("bench", package, *SMALL, "--save", "--json")
    assert (status, err) == (0, "")
    found = json.loads((package / REPORT).read_text())["benchmark"]
    assert found == json.loads(out)
    words = " ".join(cli.run("inspect", package)[1].split())
    assert f"first token, {found['settings']['lengths'][0]} tokens" in words and found["cpu"] in words
    assert cli.run("verify", package)[0] == 0


@pytest.mark.skipif(not GENAI, reason="onnxruntime-genai is not installed")
@pytest.mark.parametrize("layout", ["split", "unified"])
def test_packages_in_genai(layout: str, tiny_checkpoint: Path, peer: Path, tmp_path: Path) -> None:
    """The package, its full model, and the same model in one plain graph, all through onnxruntime-genai."""
    convert(tiny_checkpoint, package := tmp_path / "out", prune=1, layout=layout)
    numbers = {"lengths": [8], "decode_tokens": 3, "repeats": 1}
    found = subjects(bench(package, [peer], **numbers, runtime="onnxruntime-genai"))
    assert [s["kind"] for s in found.values()] == ["genai", "genai", "onnx", "genai"]
    first = {name: s["lengths"][0]["first_token"] for name, s in found.items()}
    assert first["full"] == first[str(peer)] == first[f"{peer} (genai)"]
    assert first["pop"] == bench(package, **numbers)["subjects"][0]["lengths"][0]["first_token"]


# --- peers that are another model ------------------------------------------------------------------------------


def test_warns_of_other_weights(cli: Cli, tiny_package: Path, tmp_path: Path) -> None:
    convert(save_model(tmp_path / "model", seed=1), tmp_path / "other", prune=0)
    status, out, err = cli.run("bench", tiny_package, *SMALL, "--against", tmp_path / "other", "--json")
    assert status == 0 and json.loads(out)["warnings"]
    assert err.count("\n") == 1 and f"{tmp_path / 'other'}: its first token after 8 tokens is not full's" in err


def test_warns_of_another_vocabulary(cli: Cli, tiny_package: Path, tmp_path: Path) -> None:
    save_mean_decoder(tmp_path / "mean.onnx")
    status, out, err = cli.run("bench", tiny_package, *SMALL, "--against", tmp_path / "mean.onnx", "--json")
    assert status == 0 and err.count("\n") == 1
    assert f"has a vocabulary of {VOCABULARY} tokens, full of 128: another model" in err
    assert json.loads(out)["subjects"][2]["kind"] == "onnx"


@pytest.mark.skipif(not GENAI, reason="onnxruntime-genai is not installed")
def test_leaves_out_what_genai_cannot_run(tiny_package: Path, tmp_path: Path) -> None:
    """The folder is still measured through ONNX Runtime."""
    peer = genai_folder(tiny_package, tmp_path / "peer", type="no-such-type")
    found = bench(tiny_package, [peer], lengths=[8], decode_tokens=2, repeats=1)
    assert list(subjects(found)) == ["pop", "full", str(peer)]
    (warning,) = found["warnings"]
    assert warning.startswith(f"{peer} (genai): ") and warning.endswith("left out")


def test_a_process_that_dies(tiny_package: Path) -> None:
    def kill(step: str, done: int, total: int) -> None:
        if step == "measure":
            for child in psutil.Process().children():
                if "popcompile.bench.worker" in child.cmdline():
                    child.kill()

    with pytest.raises(PopcompileError, match=r"^pop: its process was killed, most likely for want of memory; give"):
        bench(tiny_package, lengths=[8], decode_tokens=2, repeats=1, progress=kill)
    assert not [child for child in psutil.Process().children() if "popcompile.bench.worker" in child.cmdline()]


# --- runners ---------------------------------------------------------------------------------------------------


def greedy(runner: Runner, ids: list[list[int]], steps: int) -> list[list[int]]:
    """Tokens of every row, in two turns that must agree."""
    turns = []
    for _ in range(2):
        prompt = runner.encode(ids)
        runner.begin(prompt, steps)
        runner.prefill(prompt)
        likeliest = runner.likeliest()
        tokens = [runner.pick(), *(runner.step() for _ in range(steps))]
        assert tokens[0] == likeliest
        runner.end()
        turns.append(np.array(tokens).T.tolist())
    assert turns[0] == turns[1]
    return turns[0]


@pytest.mark.parametrize("batch", [1, 3])
def test_runners_generate_the_same_tokens(batch: int, tiny_package: Path, peer: Path, tmp_path: Path) -> None:
    ids = np.random.default_rng(batch).integers(128, size=(batch, 20)).tolist()
    expected = greedy(PackageRunner(Variants(tiny_package).prune(tmp_path / "full", []), "cpu", 1), ids, 12)
    decoder = read_decoder(peer / "model.onnx")
    assert decoder.in_place
    assert greedy(OnnxRunner(asdict(decoder), "cpu", 1), ids, 12) == expected
    assert greedy(OnnxRunner(asdict(replace(decoder, in_place=False)), "cpu", 1), ids, 12) == expected
    if GENAI:
        assert not any(2 in row for row in expected), "genai does not pick the end token here; take another seed"
        assert greedy(GenaiRunner(peer, "cpu", 1), ids, 12) == expected


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_graph_with_positions_and_a_growing_cache(dtype: Any, tmp_path: Path) -> None:
    weights = save_mean_decoder(tmp_path / "model.onnx", dtype)
    decoder = read_decoder(tmp_path / "model.onnx")
    assert (decoder.positions, decoder.in_place, decoder.context_length) == ("position_ids", False, None)
    ids = np.random.default_rng(0).integers(VOCABULARY, size=(2, 6)).tolist()
    expected = [mean_decoder_tokens(weights, row, 5) for row in ids]
    assert greedy(OnnxRunner(asdict(decoder), "cpu", 1), ids, 4) == expected


def test_a_pruned_package_runs_its_pruned_prefill(tiny_package: Path) -> None:
    ids = np.random.default_rng(0).integers(128, size=(1, 20)).tolist()
    runner = PackageRunner(tiny_package, "cpu", 1)
    prompt = runner.encode(ids)
    generated = load(tiny_package).generate(prompt[0][None], max_new_tokens=6, do_sample=False, prefill="pop")
    tokens = generated[0, 20:].tolist()
    assert greedy(runner, ids, 5)[0][: len(tokens)] == tokens


# --- decoders and memory ---------------------------------------------------------------------------------------


def test_read_decoder(peer: Path, tiny_package: Path) -> None:
    decoder = read_decoder(peer / "model.onnx")
    assert (decoder.vocab_size, decoder.context_length, decoder.cache_dtype) == (128, 64, "float32")
    assert decoder.past[:2] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert decoder.cache_shapes == [[2, 8]] * 4 and decoder.windows == [0] * 4 and decoder.positions is None
    assert read_decoder(tiny_package / "decode.onnx").context_length == 64  # config.json's


def test_names_of_genai_config(tmp_path: Path) -> None:
    """Whatever the graph calls them."""
    save_mean_decoder(tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    for value in (*model.graph.input, *model.graph.output):
        new = value.name.replace("past_key_values.0.", "past_0_").replace("input_ids", "tokens_in")
        for node in model.graph.node:
            for names in (node.input, node.output):
                names[:] = [new if name == value.name else name for name in names]
        value.name = new
    onnx.save(model, tmp_path / "model.onnx")
    inputs = {"input_ids": "tokens_in", "past_key_names": "past_%d_key", "past_value_names": "past_%d_value"}
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"decoder": {"inputs": inputs}}}))
    decoder = read_decoder(tmp_path / "model.onnx")
    assert (decoder.ids, decoder.past) == ("tokens_in", ["past_0_key", "past_0_value"])


def test_a_folder_as_optimum_writes_it(tiny_package: Path, tmp_path: Path) -> None:
    """The graph in onnx/, config.json above it."""
    peer = tmp_path / "peer"
    save_mean_decoder(peer / "onnx" / "model.onnx")
    (peer / "config.json").write_text(json.dumps({"max_position_embeddings": 48}))
    (subject,) = find_peers(package_subject("pop", tiny_package, "popcompile"), [peer], "popcompile")
    assert (subject.name, subject.kind, subject.context_length) == (str(peer), "onnx", 48)
    assert subject.decoder and subject.decoder.graph == str(peer / "onnx" / "model.onnx")


@pytest.mark.skipif(anonymous_bytes() is None, reason="reads Linux's /proc")
def test_anonymous_peak() -> None:
    before = anonymous_bytes()
    with AnonymousPeak() as peak:
        block = np.ones(64 << 20, dtype=np.uint8)
        size = block.nbytes
        time.sleep(0.2)
        del block
    assert before is not None and peak.bytes is not None
    assert peak.bytes > before + 0.9 * size
