"""Hub ids, against a server on loopback that speaks the hub's API: downloads, refusals, and the cache offline."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bad_input import assert_one_line, save_model, snapshot
from forks import COMMANDS, Forks
from hub_server import Hub, running_hub
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from popcompile.package.manifest import read_manifest

OPTIONS = ("--layers", "1", "--kv-projection", "layer")

OPEN = """
import json, sys
from popcompile.frontend.adapter import Adapter
from popcompile.errors import PopcompileError
from popcompile.frontend.source import open_source
for model, gguf_file in json.loads(sys.argv[1]):
    try:
        if gguf_file == "adapter":
            said = Adapter(model).sha256
        else:
            source = open_source(model, gguf_file=gguf_file)
            said = [source.kind, source.fingerprint().get("revision", ""), len(source.tensors())]
    except PopcompileError as error:
        said = str(error)
    print(json.dumps(said))
"""


def opened(client: Forks, *models: tuple[str, str | None]) -> list[Any]:
    """What opening hub ids says in a process of its own."""
    done = client.python(OPEN, json.dumps(models))
    assert (done.returncode, done.stderr) == (0, "")
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers in several files."""
    folder = save_model(tmp_path_factory.mktemp("hub") / "sharded")
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="30KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="module")
def lora(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(sharded), LoraConfig(r=2, target_modules=["q_proj"]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.requires_grad
    model.save_pretrained(folder := tmp_path_factory.mktemp("hub") / "lora")
    return folder


@pytest.fixture(scope="module")
def hub(lora: Path) -> Iterator[Hub]:
    with running_hub() as server:
        server.add("org/lora", lora)
        yield server


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub") / "cache"


@pytest.fixture(scope="module")
def client(hub: Hub, cache: Path) -> Iterator[Forks]:
    """Processes that know this hub only, and have one cache."""
    with Forks([*COMMANDS, "popcompile.frontend.source", "peft"], hub.environment(cache)) as forks:
        yield forks


def test_a_download_that_breaks_off(client: Forks, hub: Hub, cache: Path, sharded: Path, tmp_path: Path) -> None:
    names = sorted(path.name for path in sharded.glob("model-*"))
    hub.add("org/broken", sharded)
    hub.cuts = {names[1]: 100}
    (tmp_path / "work").mkdir()
    done = client.popcompile("convert", "org/broken", tmp_path / "work/out", *OPTIONS)
    assert_one_line(done.returncode, done.stdout, done.stderr)
    assert "org/broken: the download broke off" in done.stderr and "try again" in done.stderr
    assert snapshot(tmp_path / "work") == {}
    assert not list(cache.rglob("*.incomplete"))

    large = save_model(tmp_path / "large", vocab_size=2**16, hidden_size=64, head_dim=8)  # more than a chunk of 10 MB
    hub.add("org/large", large)
    hub.cuts, before = {"model.safetensors": 1}, len(hub.requests)
    assert [said[0] for said in opened(client, ("org/broken", None), ("org/large", None))] == ["hub", "hub"]
    fetched = [request.partition("bytes=")[2] for request in hub.requests[before:] if request.startswith("GET /cdn/")]
    assert fetched == ["", "", f"{10 * 2**20}-"]  # the shard that broke off; the large one, and the rest of it


def test_refusals_and_revisions(client: Forks, hub: Hub, sharded: Path, lora: Path, tmp_path: Path) -> None:
    hub.add("org/gated", sharded, gated=True)
    hub.add("org/gated-lora", lora, gated=True)
    main = hub.add("org/tagged", sharded)
    tag = hub.add("org/tagged", save_model(tmp_path / "other", seed=1), "v2")
    asked = [
        *(("org/gated", None), ("org/gated-lora", "adapter"), ("org/none", None), ("org/tagged@v9", None)),
        *(("org/tagged", "x.gguf"), ("org/tagged@", None), ("org/lora", None), ("org/tagged@\ud800", None)),
        *(("org/tagged@v2", None), ("org/tagged", None)),
    ]
    said = opened(client, *asked)
    gated = f"org/gated: gated: accept its terms at {hub.url}/org/gated and log in with that account (hf auth login)"
    assert said[0] == gated and said[1] == gated.replace("org/gated", "org/gated-lora")
    assert said[2].startswith("org/none: no such folder or file, and the hub shows no such model; fix the name, or")
    assert (
        said[3] == "org/tagged@v9: the hub's org/tagged has no revision v9; give one of its branches, tags or commits"
    )
    assert said[4] == "org/tagged: the hub's org/tagged has no file x.gguf; give one that its page lists"
    assert said[5].startswith("org/tagged@: no such folder or file")
    assert said[6] == "org/lora: no config.json; give the folder of a transformers checkpoint"
    assert said[7].startswith("org/tagged@\ud800: ")
    assert all(line.count("\n") == 0 for line in said[:8])
    assert said[8:] == [["hub", tag, 21], ["hub", main, 21]]

    done = client.popcompile("convert", "org/gated", tmp_path / "out", *OPTIONS, HF_TOKEN="hf_x")
    assert_one_line(done.returncode, done.stdout, done.stderr)
    assert gated in done.stderr and not (tmp_path / "out").exists()


def test_a_commit_converts_and_opens_offline(
    client: Forks, hub: Hub, cache: Path, sharded: Path, tmp_path: Path
) -> None:
    """Sharded, with an adapter of the hub; one transfer is cut once. The last test here that finds the hub."""
    commit = hub.add("org/sharded", sharded)
    last = sorted(path.name for path in sharded.glob("model-*"))[-1]
    hub.cuts, before = {last: 1}, len(hub.transfers(last))
    name = f"org/sharded@{commit}"
    done = client.popcompile("convert", name, tmp_path / "out", "--adapter", "org/lora", *OPTIONS)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(hub.transfers(last)) - before == 2
    cached = cache / "hub/models--org--sharded/snapshots" / commit / last
    assert cached.is_symlink() and cached.resolve().parent.name == "blobs"
    source = read_manifest(tmp_path / "out").source
    assert (source["name"], source["revision"], source["adapter"]) == (name, commit, "org/lora")
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]

    hub.shutdown()
    hub.server_close()
    offline = opened(client, (name, None), ("org/lora", "adapter"), ("org/sharded@v9", None))
    assert offline[:2] == [["hub", commit, 21], source["adapter_sha256"]]
    assert offline[2].startswith("org/sharded@v9: no such folder or file, and not in the local Hugging Face cache")


def test_a_folder_with_an_at_is_a_folder(sharded: Path, tmp_path: Path) -> None:
    from popcompile.frontend.source import open_source

    (tmp_path / "org").mkdir()
    (tmp_path / "org/name@v1").symlink_to(sharded)
    assert open_source(str(tmp_path / "org/name@v1")).kind == "folder"
