"""The report of a package: sections of its report.json as text, as JSON, and as a page that needs nothing else."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from bad_input import Cli, save_model, snapshot
from measured_report import candidate, loss, measured, save

from popcompile.conversion import convert
from popcompile.package.manifest import MANIFEST, REPORT, check_files, read_manifest
from popcompile.package.measurements import LayerChoice, Point, read_measurements
from popcompile.report.page import TEMPLATE, html_report
from popcompile.report.plots import flops_svg, frontier_svg

NAME = "a<b>&\"c'"


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of which nothing was measured."""
    parent = tmp_path_factory.mktemp("packages")
    convert(save_model(parent / "model", num_hidden_layers=4), parent / "bare", layers="2-3", kv_projection="layer")
    return parent / "bare"


@pytest.fixture(scope="module")
def full(bare: Path) -> Path:
    """A package of which everything was measured, as one with calibrated projections whose model has an odd name."""
    package = Path(shutil.copytree(bare, bare.parent / "full"))
    source = read_manifest(bare).source | {"name": f"/models/{NAME}"}
    return save(package, measured(), source=source, kv_projection="calibrated")


@pytest.fixture(scope="module")
def page(full: Path) -> str:
    return html_report(full)


@pytest.fixture
def package(bare: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bare, tmp_path / "out"))


class Page(HTMLParser):
    """A page's tags, text and ids; fails where tags do not match."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


# --- the page --------------------------------------------------------------------------------------------------


def test_page_shows_every_section(page: str) -> None:
    text = Page(page).text
    for words in (
        "Layers 2-3 run for the last 16 tokens of a prompt only",
        "the first token's distribution is 0.1250 ± 0.0125 nats from the full model's",
        "With the layers' own K/V projections it would be 0.5000 ± 0.0500 nats and 1.500 times",
        "popcompile; budget: KL of at most 0.15 nats; met",
        "measured on held-out text for 5 sets of layers",
        "2 2-3 16 1.33x 0.1250 ± 0.0125 93.8% 0.0625 96.9% 1.125 chosen",
        "6 texts, sampled from the model itself: prompts of 24 tokens and 8 after them",
        "dropped in prefill and decode",
        "list (2) this package 0.500 [0.000, 1.000]",
        "hellaswag acc 0.4000 ± 0.1000",
        "2 questions about 1 picture: prompts of 300 to 1,400 tokens, 256 of them a picture's, with 95% confidence",
        "questions (2) this package 0.500 [0.000, 1.000] 0.500 [0.000, 1.000]",
        "1.50x sooner, the first token after 1,024",
        "the first token after 1,024 tokens takes 1024 ± 20 ms; full model 1536 ± 20 ms (1.50x).",
        "1,024 full 1536 ± 20 1.50x 667",
        "threads: 2, CPU <1>; onnxruntime 1.31; median ± half the spread of 3 turns",
        "1,024 pop 100 ± 10 9.8% 1024 ± 20",
        "2 images of 256+128 tokens in every prompt; popcompile, cpu",
        "Measured on 6 texts of 32 tokens",
        "last 16 tokens own projection of x entering layer 2",
        "InsertBoundaryRecompute",
        "weights.onnx.data",
    ):
        assert words in text
    assert "ot measured" not in text


def test_page_needs_nothing_else(page: str, bare: Path) -> None:
    for text in (page, html_report(bare)):
        assert "http" not in text and "@import" not in text and text.count("url(") == text.count("url(#")
        parsed = Page(text)
        assert not {tag for tag, _ in parsed.tags} & {"script", "link", "img", "iframe", "object", "embed", "base"}
        ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
        assert len(ids) == len(set(ids))
        for _, attributes in parsed.tags:
            assert not {name for name in attributes if name.startswith("on")} | (set(attributes) & {"src", "href"})
            for value in (v or "" for name, v in attributes.items() if name in ("xlink:href", "clip-path")):
                assert value.removeprefix("url(").rstrip(")").removeprefix("#") in ids


def test_names_are_escaped(page: str) -> None:
    assert "<b>" not in page and "notes <1>" not in page
    parsed = Page(page)
    assert NAME in parsed.text and "notes <1>" in parsed.text
    (title,) = [text for text in parsed.texts if text.endswith(": what prefill skips")]
    assert title.startswith(NAME)


def test_page_of_what_was_not_measured(bare: Path) -> None:
    page = Page(html_report(bare))
    assert f"Not measured. popcompile evaluate {bare} --save measures it." in page.text
    assert "popcompile analyze " in page.text and "--prune auto --force" in page.text
    assert f"Not measured. popcompile bench {bare} --save measures it." in page.text
    assert page.text.count("Not measured.") == 4
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 1


@pytest.mark.parametrize("section", measured())
def test_each_section_may_be_alone(section: str, package: Path, cli: Cli) -> None:
    save(package, {section: measured()[section]})
    Page(html_report(package))
    assert cli.run("inspect", package)[0] == 0
    save(package, {section: None})  # as missing
    document = json.loads(cli.run("inspect", package, "--json")[1])
    assert set(document["not_measured"]) == {"quality", "time", "importance", "frontier"}


def test_numbers_that_are_no_ordinary_ones(package: Path, cli: Cli) -> None:
    """An infinite perplexity, an unknown error, no budget, nothing chosen, one candidate, no loss at all."""
    sections = measured()
    odd = candidate([3], 0.0)
    odd["loss"] |= {"ppl_ratio": math.inf, "first_token_kl_error": None}
    sections["choice"] |= {"frontier": [odd], "budget": None, "met": False}
    sections["quality"]["loss"] = loss(0) | {"ppl_ratio": 1e12, "first_token_kl_error": math.nan}
    save(package, {name: sections[name] for name in ("choice", "quality")})
    page = Page(html_report(package)).text
    assert "1 3 16 1.14x 0.0000 100.0% 0.0000 100.0% inf" in page
    assert "chosen by popcompile KV projection" in page and "1.0e+12 times" in page
    assert "1.0e+12 times full" in cli.run("inspect", package)[1]


def test_a_set_that_was_not_measured_to_its_end(package: Path, cli: Cli) -> None:
    sections = measured()
    stopped = candidate([0, 3], 0.3)
    stopped["loss"] |= {"retrieval_kl": 0.75, "at_least": True}
    sections["choice"] |= {"frontier": [candidate([3], 0.0), stopped]}
    save(package, {"choice": sections["choice"]})
    assert "> 0.7500" in Page(html_report(package)).text and "> 0.7500" in cli.run("inspect", package)[1]
    sections["choice"]["frontier"].append(candidate([1, 3], 0.9))
    save(package, {"choice": sections["choice"]})
    assert "> 0.7500" not in Page(html_report(package)).text  # of as many layers one is known


def test_nothing_pruned(package: Path) -> None:
    page = Page(html_report(save(package, {}, pruned=[]))).text
    assert "Nothing is pruned: prefill and decode run every layer." in page and "0 of 4 layers: none" in page


def test_template_is_installed() -> None:
    assert resources.files("popcompile.report").joinpath(TEMPLATE).is_file()


def test_plots_are_elements_and_the_same_every_time(full: Path) -> None:
    report = json.loads((full / REPORT).read_text())
    choice = read_measurements(report, read_manifest(full)).choice
    assert choice is not None
    for svg in (frontier_svg(choice), flops_svg(report["layers"], 1024)):
        assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert frontier_svg(choice) == frontier_svg(choice)
    assert ">budget<" in frontier_svg(choice) and ">chosen, window 16<" in frontier_svg(choice)
    assert "pruned in prefill" in flops_svg(report["layers"], 1024)


@pytest.mark.parametrize(
    "module",
    [
        "report.inspection", "report.page", "package.manifest", "pruning.request", "package.integrity",
        "package.compatibility", "cli",
    ],
)  # fmt: skip
def test_reading_a_package_loads_no_compiler(module: str) -> None:
    """`inspect` answers at once."""
    heavy = ("torch", "transformers", "onnxruntime", "popcompile.passes.base", "matplotlib")
    code = f"import sys, popcompile.{module}; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_report_is_read_as_it_was_written(full: Path) -> None:
    manifest = read_manifest(full)
    found = read_measurements(json.loads((full / REPORT).read_text()), manifest)
    assert found.choice is not None and found.quality is not None
    written = {"choice": found.choice.to_json(), "quality": found.quality.to_json()}
    again = read_measurements(json.loads(json.dumps(written)), manifest)
    assert (again.choice, again.quality) == (found.choice, found.quality)


def test_best_of_every_number(full: Path) -> None:
    choice = read_measurements(json.loads((full / REPORT).read_text()), read_manifest(full)).choice
    assert isinstance(choice, LayerChoice) and all(isinstance(point, Point) for point in choice.frontier)
    assert [point.pruned for point in choice.best()] == [[3], [2, 3], [1, 2, 3]]


# --- the terminal ----------------------------------------------------------------------------------------------


def test_text(full: Path, cli: Cli) -> None:
    status, out, err = cli.run("inspect", full)
    assert (status, err) == (0, "")
    lines, words = [" ".join(line.split()) for line in out.splitlines()], " ".join(out.split())
    assert "layers chosen by popcompile; budget: KL of at most 0.15 nats; met" in lines
    assert "first token, 256 tokens 256 ± 20 ms; full model 384 ± 20 ms (1.50x)" in words
    assert "- measured on popcompile, cpu, threads: 2, CPU <1>; onnxruntime 1.31" in words
    assert "with images, 1,024 tokens 2 images of 256+128 tokens: 1024 ± 20 ms, 9.8% of it vision; full" in words
    quality = "first-token KL 0.1250 ± 0.0125 nats, agreement 93.8%; perplexity 1.125 times full"
    assert f"quality on held-out text {quality}" in words
    assert "- measured on 6 texts, sampled from the model itself: prompts of 24 tokens and 8 after them" in words
    assert "2 2-3 16 1.33x 0.1250 0.0625 1.125 *" in lines
    assert not [line for line in lines if line.startswith("2 1,3 ")], "the best of each number"
    assert "not measured" not in out


def test_text_of_what_was_not_measured(bare: Path, cli: Cli) -> None:
    out = " ".join(cli.run("inspect", bare)[1].split())
    assert f"quality not measured; `popcompile evaluate {bare} --save` measures it" in out
    assert f"first token not measured; `popcompile bench {bare} --save` measures it" in out
    assert "layers chosen by not recorded" in out and f"{bare} --prune auto --force` measures it" in out
    document = json.loads(cli.run("inspect", bare, "--json")[1])
    assert document["not_measured"]["quality"] == f"popcompile evaluate {bare} --save"


@pytest.mark.parametrize(
    ("how", "words"), [("count", "popcompile; the user gave their number"), ("layers", "the user; budget")]
)
def test_who_chose(how: str, words: str, package: Path, cli: Cli) -> None:
    save(package, {"choice": measured()["choice"] | {"how": how, "met": False}})
    out = cli.run("inspect", package)[1]
    assert words in out and "nats; not met" in out


# --- where the page goes ---------------------------------------------------------------------------------------


def test_command_writes_the_page(full: Path, page: str, tmp_path: Path, cli: Cli) -> None:
    before = snapshot(full)
    path = tmp_path / "report.html"
    path.write_text("old")
    path.chmod(0o640)
    (tmp_path / "link.html").symlink_to(path)
    for given in (path, tmp_path / "link.html"):
        assert cli.run("inspect", full, "--html", given) == (0, f"{given}\n", "")
        assert path.read_text(encoding="utf-8") == page, "the same bytes every time"
    assert path.stat().st_mode & 0o777 == 0o640 and (tmp_path / "link.html").is_symlink()
    assert {p.name for p in tmp_path.iterdir()} == {"report.html", "link.html"}
    assert snapshot(full) == before


def test_places_that_take_no_page(package: Path, tmp_path: Path, cli: Cli) -> None:
    os.link(package / "config.json", tmp_path / "hard-link")
    (tmp_path / "link").symlink_to(package / MANIFEST)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x.html")
    os.mkfifo(tmp_path / "pipe")
    for path, words in {
        tmp_path / "missing" / "x.html": f"there is no folder {tmp_path / 'missing'}; create it first",
        tmp_path / "dangling": "create it first",
        tmp_path / MANIFEST / "x.html": "create it first",
        tmp_path: "is a folder; give a file name",
        tmp_path / ("x" * 300): "File name too long; give another",
        tmp_path / "pipe": "is no regular file; give a file name",
        package / REPORT: "is report.json of the package; choose another place",
        package / "passes" / ".." / "prefill.onnx": "is prefill.onnx of the package",
        package / MANIFEST: "is popcompile.json of the package",
        tmp_path / "link": "is popcompile.json of the package",
        tmp_path / "hard-link": "is config.json of the package",
    }.items():
        assert words in cli.refuses("inspect", package, "--html", path)
    assert "is empty; give a name" in cli.refuses("inspect", package, "--html", "")
    assert cli.run("inspect", package, "--html", package / "new.html")[0] == 0
    check_files(package, read_manifest(package), full=True)


def test_place_without_permission(package: Path, tmp_path: Path, cli: Cli) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    try:
        if os.access(locked, os.W_OK):
            pytest.skip("root writes everywhere")
        assert "no permission to write there" in cli.refuses("inspect", package, "--html", locked / "x.html")
    finally:
        locked.chmod(0o700)


@pytest.mark.parametrize("other", [["--json"], ["--pass", "Cleanup"], ["--json", "--pass", "Cleanup"]])
def test_one_way_at_a_time(other: list[str], package: Path, tmp_path: Path, cli: Cli) -> None:
    assert "give one of them" in cli.refuses("inspect", package, "--html", tmp_path / "x.html", *other)


# --- reports that are none -------------------------------------------------------------------------------------


def drop(*path: str | int) -> Callable[[Any], None]:
    return lambda sections: _parent(sections, path).pop(path[-1])


def put(value: Any, *path: str | int) -> Callable[[Any], None]:
    return lambda sections: _parent(sections, path).__setitem__(path[-1], value)


def _parent(sections: Any, path: tuple[str | int, ...]) -> Any:
    for step in path[:-1]:
        sections = sections[step]
    return sections


ODD: dict[str, Callable[[Any], None]] = {
    "a list": put([], "quality"),
    "a word": put("good", "choice"),
    "no loss": drop("quality", "loss"),
    "no KL": drop("quality", "loss", "first_token_kl"),
    "KL in words": put("low", "quality", "loss", "first_token_kl"),
    "NaN": put(math.nan, "quality", "loss", "ppl_ratio"),
    "half a text": put(1.5, "quality", "texts"),
    "no way of choosing": put("luck", "choice", "how"),
    "half a budget": put({"max_kl": 1}, "choice", "budget"),
    "no frontier": drop("choice", "frontier"),
    "layers in words": put("1-2", "choice", "frontier", 0, "pruned"),
    "layers of another model": put([99], "choice", "frontier", 0, "pruned"),
    "a window in words": put("wide", "choice", "frontier", 0, "window"),
    "no speedup": put(None, "choice", "frontier", 0, "speedup"),
    "layers without importance": drop("importance", "layers", 1),
    "importance in words": put("high", "importance", "layers", 0, "prefill"),
    "an evaluation of nothing": put({}, "evaluation"),
    "a metric without a value": drop("evaluation", "texts", "notes <1>", "perplexity_ratio", "value"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_sections(case: str, package: Path, tmp_path: Path, cli: Cli) -> None:
    sections = copy.deepcopy(measured())
    ODD[case](sections)
    save(package, {name: content for name, content in sections.items() if content != measured()[name]})
    for option in ([], ["--html", tmp_path / "x.html"]):
        line = cli.refuses("inspect", package, *option)
        assert "report.json is not a report of this popcompile" in line and "convert the model again" in line
