"""One case: what was damaged, the command that is run on it, and what may come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

#: what exit 0 may mean; exit 2 with one line is always allowed
EXPECTATIONS = {
    "refused": "nothing: only exit 2 is right",
    "same": "the undamaged input's answer and logits: the damage is none that a command should act on",
    "logits": "the undamaged input's logits: the damage may change what is printed, not what the graphs compute",
    "any": "another model: its output is finite",
    "transformers": "transformers loads the same folder, and where a package was made, with the same logits",
    "peft": "PEFT merges the same adapter, and where a package was made, with the same logits",
}


@dataclass
class Case:
    """words: the damage. command: popcompile's arguments, run in the workspace, or ["load", PACKAGE] for the API.

    out: what the command may leave in the workspace when it succeeds.
    package, model, adapter: what the check after a success opens. stdout, stderr: "file", or a device to write to.
    """

    words: str
    command: list[str]
    expect: str
    package: str | None = None
    base: str = "split"
    model: str | None = None
    gguf: str | None = None
    adapter: str | None = None
    out: list[str] = field(default_factory=list)
    stdin: str = "y\n"
    stdout: str = "file"
    stderr: str = "file"
    unprivileged: bool = False

    @property
    def traces(self) -> bool:
        """Whether the command traces a model, if it gets there: seconds, where others take a tenth."""
        return self.command[0] in ("analyze", "convert") and self.expect != "refused"


@dataclass
class Workspace:
    """A folder for one case; commands run in it and see the same short names whatever the seed.

    root: what is fuzzed, and outside/ with files that nothing may read as a part of it or change.
    bases: the undamaged inputs, read only.
    """

    root: Path
    bases: Path

    @property
    def outside(self) -> Path:
        return self.root / "outside"

    def trap(self, path: Path) -> None:
        """Foreign code: a Python file that leaves a mark where it is run, whatever is asked of it."""
        mark = self.root / "ran" / path.name
        path.write_text(TRAP.format(mark=str(mark)))


#: a module that leaves a mark, and serves whatever class an auto_map names
TRAP = """\
import pathlib
mark = pathlib.Path({mark!r})
mark.parent.mkdir(exist_ok=True)
mark.write_text("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig): pass
class Model(LlamaForCausalLM): pass
class Tokenizer(PreTrainedTokenizerFast): pass
"""

AUTO_MAP = {
    "AutoConfig": "trap.Config",
    "AutoModelForCausalLM": "trap.Model",
    "AutoTokenizer": ["trap.Tokenizer", "trap.Tokenizer"],
}

Maker = Callable[[Random, Workspace], Case]
