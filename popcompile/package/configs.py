"""transformers' configs and tokenizer of a package, made of the bytes that its manifest means; none of its code is run.

transformers' own `from_pretrained` looks for further files in a folder, and asks on the terminal whether it may run
code that a config names; `from_dict` does neither.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import CONFIG_MAPPING, AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_torchvision_available

from popcompile import config_schema
from popcompile.errors import PopcompileError
from popcompile.loading import quiet, reading
from popcompile.package.integrity import read_file, require_only_listed
from popcompile.package.manifest import PASSES, REPORT, Manifest, read_manifest
from popcompile.upstream import processor_without_videos, takes_videos

if TYPE_CHECKING:
    from transformers import ProcessorMixin

CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
#: what says how images become pixels
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
#: how families call the number of layers
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def read_config(folder: Path, manifest: Manifest) -> PretrainedConfig:
    """The model's config; of a model type that is code of the checkpoint, a plain one with the same fields.

    Raises PopcompileError for one that does not belong to the manifest, or that transformers refuses.
    """
    data = _read(folder, manifest, CONFIG)
    if data.get("model_type") != manifest.model_type:
        raise PopcompileError(f"{folder}: {CONFIG} is of another model type than the manifest; convert the model again")
    if wrong := [name for name in _LAYERS if data.get(name) not in (None, manifest.num_layers)]:
        raise PopcompileError(
            f"{folder}: {CONFIG} says {wrong[0]} {str(data[wrong[0]])[:40]!r}, the manifest {manifest.num_layers};"
            " convert the model again"
        )
    try:
        kind = CONFIG_MAPPING[manifest.model_type]  # which has no `get`
    except KeyError:
        kind = PretrainedConfig
    with quiet(), reading(str(folder), f"{CONFIG} does not load"):
        config: PretrainedConfig = kind.from_dict(data)
        config.name_or_path = str(folder)
        return config


def read_generation_config(folder: Path, manifest: Manifest, config: PretrainedConfig) -> GenerationConfig:
    """The model's, or where the package has none what `config` says. Raises PopcompileError."""
    if GENERATION_CONFIG not in manifest.files:
        return GenerationConfig.from_model_config(config)
    data = _read(folder, manifest, GENERATION_CONFIG)
    config_schema.check_fields(f"{folder}: {GENERATION_CONFIG}", data, config_schema.GENERATION)
    with quiet(), reading(str(folder), f"{GENERATION_CONFIG} does not load"):
        return GenerationConfig.from_dict(data)


def load_tokenizer(folder: Path, manifest: Manifest | None = None) -> PreTrainedTokenizerBase:
    """The package's tokenizer, made of the files that its manifest means.

    manifest: of the model that it is for, where that is loaded already. Raises PopcompileError where the package has
    none, or is another one by now.
    """
    there = _same(folder, manifest)
    with _private_copy(folder, there) as copy:
        try:
            with reading(str(folder), "its tokenizer does not load"):
                tokenizer = AutoTokenizer.from_pretrained(copy, trust_remote_code=False, local_files_only=True)
        except PopcompileError as error:
            raise PopcompileError(
                f"{folder}: the package has no usable tokenizer; convert a model that comes with one"
            ) from error
    tokenizer.name_or_path = str(folder)
    return tokenizer


def _same(folder: Path, manifest: Manifest | None) -> Manifest:
    """The manifest that is there. Raises PopcompileError where it is another than the one given."""
    there = read_manifest(folder)
    if manifest is not None and there != manifest:
        raise PopcompileError(f"{folder}: was replaced while it was loaded; load it again")
    return there


@contextlib.contextmanager
def _private_copy(folder: Path, manifest: Manifest) -> Iterator[str]:
    """A folder with the package's small files, checked, for transformers to load from: no others, and no code."""
    require_only_listed(folder, manifest.files)
    if TOKENIZER_CONFIG in manifest.files:
        data = _read(folder, manifest, TOKENIZER_CONFIG)
        config_schema.check_types(f"{folder}: {TOKENIZER_CONFIG}", data, config_schema.TOKENIZER)
    others = {*manifest.graphs.values(), manifest.weights, REPORT}
    with tempfile.TemporaryDirectory(prefix="popcompile-", ignore_cleanup_errors=True) as temporary, quiet():
        for name in manifest.files:
            if name not in others and not name.startswith(f"{PASSES}/"):
                path = Path(temporary, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(read_file(folder, manifest, name))
        yield temporary


def load_processor(folder: str | Path, manifest: Manifest | None = None) -> ProcessorMixin:
    """The processor of text and images of a vision-language model's package, as AutoProcessor makes it.

    manifest: as for `load_tokenizer`. Raises PopcompileError where the package has none.
    """
    folder = Path(folder)
    there = _same(folder, manifest)
    if there.images is None or not set(PROCESSOR_FILES) & set(there.files):
        raise PopcompileError(
            f"{folder}: has no processor of images; convert a vision-language checkpoint that comes with one"
        )
    with _private_copy(folder, there) as copy, reading(str(folder), "its processor does not load"):
        return processor_in(copy, there.model_type)


def processor_in(folder: str, model_type: str) -> ProcessorMixin:
    """The processor that a model type's files in a folder of one's own describe: one of text and images alone where
    there is no torchvision, which transformers' processors of videos need.
    """
    from transformers import AutoImageProcessor, AutoProcessor  # which import all that models are made of: seconds

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    if is_torchvision_available() or not takes_videos(model_type):
        processor: ProcessorMixin = AutoProcessor.from_pretrained(folder, **options)
        return processor
    images = AutoImageProcessor.from_pretrained(folder, **options)
    return processor_without_videos(model_type, images, AutoTokenizer.from_pretrained(folder, **options))


def _read(folder: Path, manifest: Manifest, name: str) -> dict[str, Any]:
    try:
        data = json.loads(read_file(folder, manifest, name))
    except (ValueError, RecursionError) as error:
        raise PopcompileError(f"{folder}: {name} is not JSON; convert the model again") from error
    if not isinstance(data, dict):
        raise PopcompileError(f"{folder}: {name} is not a JSON object; convert the model again")
    return data
