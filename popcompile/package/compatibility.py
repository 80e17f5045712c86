"""Which runtimes load a package as it is, and why another does not: told before a user finds out.

Each was tried with the packages of this version (tests/real/test_genai.py, tests/runtime/test_genai_images.py,
examples/clients/).
"""

from __future__ import annotations

from dataclasses import dataclass

from popcompile.package.manifest import Manifest

#: the first ONNX Runtime whose GroupQueryAttention takes no new keys (export/attention_blocks.py)
ONNXRUNTIME = "1.27"


#: of a model of images, whose decoder genai takes from one graph and not from a pipeline
_GENAI_IMAGES = "{} alone, a decoder; pictures (PNG, JPEG) in the first turn, rows of one length"

#: of the same in transformers.js
_JS_IMAGES = "on Node; it scales pictures otherwise, and with grids takes one a prompt"
_JS_NO_GRAPHS = "no, it looks for other graphs; convert with --layout unified"


@dataclass(frozen=True)
class Compatibility:
    """loads: whether the runtime loads the package. note: how, or why not and what to do."""

    runtime: str
    loads: bool
    note: str

    def __str__(self) -> str:
        return f"{self.runtime}: {self.note}"


def runtimes(manifest: Manifest) -> list[Compatibility]:
    """What is known of each runtime, for a package with this manifest."""
    graphs = _listed(list(manifest.graphs.values()))
    found = [
        Compatibility("popcompile", True, "generate() of transformers, all rows of a batch"),
        Compatibility(f"ONNX Runtime {ONNXRUNTIME} or newer", True, f"{graphs}; batches padded on the right"),
    ]
    if manifest.images is not None:
        in_node = "text_embedding" in manifest.graphs
        return [
            *found,
            Compatibility("onnxruntime-genai", True, _GENAI_IMAGES.format(manifest.graphs["prefill"])),
            Compatibility("optimum", False, "no, it loads decoders of text; convert with --text-only"),
            Compatibility("transformers.js", in_node, _JS_IMAGES if in_node else _JS_NO_GRAPHS),
        ]
    if manifest.layout == "split":
        one_graph = "no, it loads one graph; convert with --layout unified"
        return [
            *found,
            Compatibility(
                "onnxruntime-genai", True, "a decoder-pipeline, which holds the weights twice and cannot rewind"
            ),
            Compatibility("optimum", False, one_graph),
            Compatibility("transformers.js", False, one_graph),
        ]
    left = "prompts of one length, for it pads a batch on the left"
    return [
        *found,
        Compatibility("onnxruntime-genai", True, "one decoder; no speculative decoding: several tokens are a prompt"),
        Compatibility("optimum", True, left),
        Compatibility("transformers.js", True, left),
    ]


def _listed(names: list[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last
