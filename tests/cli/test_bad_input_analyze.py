"""Bad input to `popcompile analyze`: one line with cause and fix, exit status 2, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bad_input import TENSORS, UP, Cli, assert_one_line, change_tensor, fill, snapshot
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PhiConfig

from popcompile.errors import PopcompileError
from popcompile.pruning.analyze import analyze
from popcompile.report.plots import write_prefill_plot
from popcompile.terminal import printable

FEW = ("--texts", 1, "--tokens", 4)


def test_wrong_arguments(cli: Cli, model: Path) -> None:
    assert "required: MODEL (see popcompile analyze --help)" in cli.refuses("analyze")
    for option in ("--texts", "--tokens"):
        for count in ("0", "-1", "1.5", "many", "9" * 30):
            assert "is not a number of at least 1" in cli.refuses("analyze", model, option, count)
    for seed in ("x", "1.5", "", "-1", str(2**32)):
        assert "is not a seed, a number from 0 to 4294967295" in cli.refuses("analyze", model, "--seed", seed)
    assert "--per head: unknown; choose one of layer, block" in cli.refuses("analyze", model, "--per", "head")
    assert "--tokens 1: give at least 2, a context token and the b" in cli.refuses("analyze", model, "--tokens", 1)
    assert "has 64 positions; give fewer" in cli.refuses("analyze", model, "--tokens", 65)


def test_wrong_arguments_of_the_function(model: Path) -> None:
    with pytest.raises(PopcompileError, match="--texts 0: give at least 1"):
        analyze(model, texts=0)
    with pytest.raises(PopcompileError, match="--tokens -1: give at least 2"):
        analyze(model, tokens=-1)


def test_the_largest_seed(cli: Cli, model: Path) -> None:
    seed = 2**32 - 1
    status, out, err = cli.run("analyze", model, *FEW, f"--seed={seed}")
    assert (status, err) == (0, "") and f"seed {seed}," in out


def test_wrong_plots(cli: Cli, model: Path, tmp_path: Path) -> None:
    """Refused before any work: MODEL need not even be there."""
    (tmp_path / "folder.svg").mkdir()
    for name, words in {
        "plot.pdf": "unknown format; end the name in .svg or .png",
        "plot": "unknown format; end the name in .svg or .png",
        "missing/plot.svg": "missing; create it first",
        "model/config.json/plot.svg": "create it first",
        "folder.svg": "is a folder; give a file name",
        "x" * 300 + ".svg": "File name too long; give another",
        "plot.svg/": "is the name of a folder; give a file name",
    }.items():
        assert words in cli.refuses("analyze", tmp_path / "no-model", "--plot", f"{tmp_path}/{name}")


def test_plot_without_permission(cli: Cli, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    try:
        (locked / "probe").touch()
    except PermissionError:
        assert "no permission to write there" in cli.refuses("analyze", "no-model", "--plot", locked / "plot.svg")
    else:
        (locked / "probe").unlink()
        pytest.skip("root may write everywhere")


def test_full_disk(cli: Cli, model: Path, tmp_path: Path) -> None:
    """The numbers are printed before the plot fails; of that nothing is left, and what was there stays."""
    resource = pytest.importorskip("resource")
    plot = tmp_path / "plot.svg"
    plot.write_text("an older one")
    before = snapshot(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, limits[1]))
    try:
        status, out, err = cli.run("analyze", model, *FEW, "--plot", plot)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_one_line(status, "", err)
    assert "cannot be written (File too large); raise the limit of file sizes" in err and "prefill/decode" in out
    assert snapshot(tmp_path) == before


def test_a_plot_that_is_no_file(cli: Cli, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full is Linux's")
    (tmp_path / "plot.svg").symlink_to("/dev/full")
    assert "is no regular file" in cli.refuses("analyze", "no-model", "--plot", tmp_path / "plot.svg")


def test_names_in_plots(tmp_path: Path) -> None:
    """What matplotlib would read as mathematics, or leave out, and what no SVG may hold."""
    from xml.etree import ElementTree

    for name in (r"a$\frac$", "_hidden", "a\x1b[31m", "a\udcff"):
        row = {"tokens": 8, "prefill": {"median": 1.0, "seconds": [1.0, 2.0]}}
        subjects = [{"name": name, "lengths": [row]}, {"name": "pop", "lengths": [row]}]
        result = {"source": name, "dtype": "fp32", "settings": {}, "subjects": subjects}
        write_prefill_plot(tmp_path / "x.svg", result)
        texts = " ".join(text for text in ElementTree.parse(tmp_path / "x.svg").getroot().itertext())
        assert texts.count(printable(name)) == 2


def test_wrong_models(cli: Cli, tmp_path: Path) -> None:
    assert "no such folder or file" in cli.refuses("analyze", tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in cli.refuses("analyze", tmp_path / "empty")
    (tmp_path / "x.gguf").write_bytes(b"GGUF\3\0\0\0")
    assert "the GGUF header is truncated or corrupt" in cli.refuses("analyze", tmp_path / "x.gguf")
    assert "drop --gguf-file a.gguf" in cli.refuses("analyze", tmp_path / "x.gguf", "--gguf-file", "a.gguf")


@pytest.mark.parametrize("case", ["missing", "shape", "integers", "NaN"])
def test_wrong_tensors(case: str, cli: Cli, model: Path) -> None:
    change, _, words = TENSORS[case]
    change_tensor(model, UP, change)
    assert words in cli.refuses("analyze", model, *FEW)


def test_infinity_names_the_layers_tensor(cli: Cli, model: Path) -> None:
    change_tensor(model, UP, fill(float("inf")))
    assert f"tensor {UP} holds NaN or infinity; fix the checkpoint" in cli.refuses("analyze", model, *FEW)


def test_activations_that_overflow(cli: Cli, model: Path) -> None:
    """Finite weights whose products are not."""
    tensors = load_file(model / "model.safetensors")
    for name in ("gate_proj", "up_proj", "down_proj"):
        tensors[f"model.layers.0.mlp.{name}.weight"].fill_(1e30)
    save_file(tensors, model / "model.safetensors")
    assert "overflow" in cli.refuses("analyze", model, *FEW)


def test_broken_tokenizer(cli: Cli, model: Path) -> None:
    (model / "tokenizer.json").write_text("{")
    assert "the tokenizer cannot be loaded" in cli.refuses("analyze", model, *FEW)


def test_a_model_without_tokenizer_is_analyzed(cli: Cli, model: Path) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    status, out, err = cli.run("analyze", model, *FEW)
    assert (status, err) == (0, "") and "prefill/decode" in out


def test_parallel_blocks_have_no_gates_of_their_own(cli: Cli, tmp_path: Path) -> None:
    """Phi adds attention and MLP to the residual stream in one step."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = PhiConfig(**sizes, num_attention_heads=4, max_position_embeddings=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    line = cli.refuses("analyze", tmp_path / "model", *FEW, "--per", "block")
    assert "its gates can only be per layer" in line
    status, out, err = cli.run("analyze", tmp_path / "model", *FEW)
    assert (status, err) == (0, "") and "prefill/decode" in out


def test_texts_from_a_file(cli: Cli, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat " * 30)
    status, out, err = cli.run("analyze", model, "--text", text, "--texts", 2, "--tokens", 12)
    assert (status, err) == (0, "") and "2 texts of 12 tokens" in out
    text.write_text("the cat sat")
    assert "give more text" in cli.refuses("analyze", model, "--text", text, "--tokens", 12)
    assert "no such file" in cli.refuses("analyze", model, "--text", tmp_path / "nothing.txt", *FEW)
    text.write_text("the cat sat " * 30)
    for path in model.glob("tokenizer*"):
        path.unlink()
    assert "has no tokenizer" in cli.refuses("analyze", model, "--text", text, *FEW)
