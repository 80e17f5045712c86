"""What an evaluation compares: the full model with a package's pruned prefill, and with variants of the package."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from popcompile.errors import PopcompileError
from popcompile.package.manifest import Manifest, read_manifest
from popcompile.progress import Progress
from popcompile.runtime.encoder import Encoder
from popcompile.runtime.session import Runtime
from popcompile.variants import Variants, with_full_model


class Encoders(NamedTuple):
    """full: what is compared with. compared: "pop", the package; then its variants, and "full", its own full model,
    where `full` is another package's.
    """

    full: Encoder
    compared: dict[str, Encoder]

    @property
    def by_name(self) -> dict[str, Encoder]:
        return {"reference": self.full, **self.compared}


@contextlib.contextmanager
def open_encoders(
    folder: Path, manifest: Manifest, provider: str, *, reference: Path | None, baselines: bool, progress: Progress
) -> Iterator[Encoders]:
    """While the block runs. reference: the package whose full model is compared with, by default this one's. baselines:
    compile variants of the package as well. Raises PopcompileError.
    """
    require_comparable(folder, manifest, reference, baselines)
    with contextlib.ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(prefix="popcompile-", ignore_cleanup_errors=True))

        def open_runtime(package: Path, **options: Any) -> Runtime:
            runtime = Runtime(package, provider=provider, **options)
            stack.callback(runtime.close)  # Windows removes no file that a session has mapped
            return runtime

        runtime = open_runtime(stack.enter_context(with_full_model(folder)))
        expected = runtime
        if reference is not None:
            expected = open_runtime(stack.enter_context(with_full_model(reference)), main="decode")
        compared = {"pop": Encoder(runtime, "prefill")}
        if baselines:
            progress("variants", 0, 1)
            # variants share the weights, and no copies of them are packed: but of quantized ones, which are small, and
            # for which packed kernels are others
            for name, path in _compile_baselines(runtime.folder, manifest, Path(temporary)).items():
                compared[name] = Encoder(open_runtime(path, low_memory=not manifest.quantized), "prefill")
        if reference is not None:
            compared["full"] = Encoder(runtime, "decode")
        yield Encoders(Encoder(expected, "decode"), compared)


def require_comparable(folder: Path, manifest: Manifest, reference: Path | None, baselines: bool) -> None:
    """Raise PopcompileError where there is nothing to compare."""
    if baselines and not manifest.pruned:
        raise PopcompileError(f"{folder}: nothing is pruned in it, so --baselines would all be the same; leave it out")
    if reference is None:
        return
    other = read_manifest(reference)
    if other.vocab_size != manifest.vocab_size or other.context_length < manifest.context_length:
        raise PopcompileError(
            f"--reference {reference}: it is another model ({other.source['name']}, a vocabulary of"
            f" {other.vocab_size}); give a package of {manifest.source['name']}"
        )


def require_vocabulary(folder: Path, manifest: Manifest, texts: Sequence[Tensor]) -> None:
    """Raise PopcompileError where token ids are beyond the model's."""
    highest = max(int(ids.max()) for ids in texts)
    if highest >= manifest.vocab_size:
        raise PopcompileError(
            f"{folder}: its tokenizer makes token {highest} and its model has {manifest.vocab_size}; convert a model"
            " with its own tokenizer"
        )


def _compile_baselines(folder: Path, manifest: Manifest, temporary: Path) -> dict[str, Path]:
    """Variants of the package by name, in `temporary`."""
    variants = Variants(folder)
    paths = {"dropped": variants.drop(temporary / "dropped", manifest.pruned)}
    if manifest.kv_projection != "layer":
        paths["layer"] = variants.prune(temporary / "layer", manifest.pruned)
    return paths
