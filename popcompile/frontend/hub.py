"""Find what the user named: a local folder or file, or a repository of the hub, in its cache or downloaded into it.

folder, model.gguf          what exists on disk wins
org/name                    the hub's repository, its main branch; the cache where the hub cannot be reached
org/name@revision           a branch, tag or commit of it
"""

import os
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from popcompile.errors import PopcompileError
from popcompile.files import require_utf8
from popcompile.loading import one_line

HUB_TIMEOUT = 3.0
"""Seconds to wait for the hub to answer before the local cache is used."""

_OTHER_FORMATS = ["*/*.safetensors", "*/*.model"]
"""Copies of weights and tokenizers in a repository's sub-folders."""


def local_path(name: str) -> Path | None:
    """The path that the user named, None where there is nothing. Raises PermissionError where nobody may look."""
    try:
        path = Path(os.path.expanduser(name))
        return path if name.strip() and path.stat() else None
    except PermissionError:
        raise
    except (OSError, ValueError):  # no such path, a name too long, with a null byte or half of a surrogate pair
        return None


def snapshot(name: str, wanted: list[str]) -> Path:
    """The folder `name`, or the hub repository's with the `wanted` files, in its local cache.

    Raises:
        PopcompileError: there is none.
    """
    path = local_path(name)
    if path is None:
        return download(name, wanted=wanted)
    if not path.is_dir():
        raise PopcompileError(f"{name}: is a file; give the folder that holds it")
    require_utf8(path)
    return path


def download(name: str, *, wanted: list[str] | None = None, file: str | None = None) -> Path:
    """The snapshot folder of "org/name" or "org/name@revision" with the `wanted` files (patterns), or one file in it.

    huggingface_hub itself falls back to its cache where the hub cannot be reached. A download that broke off is taken
    up again by the next call, which keeps the files that are whole.

    Raises:
        PopcompileError: there is none, or none that this user may read; the download broke off.
    """
    repository, revision = _parts(name)
    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(repository, file, revision=revision, etag_timeout=HUB_TIMEOUT))
        return Path(
            huggingface_hub.snapshot_download(
                repository,
                revision=revision,
                allow_patterns=wanted,
                ignore_patterns=_OTHER_FORMATS,
                etag_timeout=HUB_TIMEOUT,
            )
        )
    except Exception as error:  # a network client's failures cannot be listed: proxies, TLS, timeouts, disk
        raise PopcompileError(f"{name}: {_explained(error, repository, revision, file)}") from error


def _parts(name: str) -> tuple[str, str | None]:
    """Repository and revision; no repository's name has an @."""
    repository, _, revision = name.partition("@")
    return (repository, revision) if revision else (name, None)


def _explained(error: Exception, repository: str, revision: str | None, file: str | None) -> str:
    """What a failure of the hub's client means, and what to do."""
    page = f"{huggingface_hub.constants.ENDPOINT}/{repository}"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        return f"gated: accept its terms at {page} and log in with that account (hf auth login)"
    if isinstance(error, RepositoryNotFoundError):
        return (
            "no such folder or file, and the hub shows no such model; "
            f"fix the name, or, for a private or gated one, log in (hf auth login) and accept its terms at {page}"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"the hub's {repository} has no revision {revision}; give one of its branches, tags or commits"
    if isinstance(error, getattr(huggingface_hub.errors, "IncompleteSnapshotError", ())):
        return (
            "only a part of it is in the local Hugging Face cache (the hub cannot be reached); "
            "download it again where the hub can be reached"
        )
    if isinstance(error, LocalEntryNotFoundError | HFValidationError):
        cause = error.__cause__
        why = "the hub cannot be reached"
        if isinstance(cause, HfHubHTTPError):
            why = f"the hub answers {cause.response.status_code}"
        elif isinstance(cause, FileMetadataError):
            why = f"{huggingface_hub.constants.ENDPOINT} does not answer as a hub does"
        return (
            "no such folder or file, and not in the local Hugging Face cache "
            f"({why}); give a local folder, a .gguf file, or a cached hub id"
        )
    if isinstance(error, EntryNotFoundError):
        return f"the hub's {repository} has no file {file}; give one that its page lists"
    if status in (401, 403):
        return f"the hub refuses access ({status}); log in with a valid token (hf auth login), see {page}"
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError | TimeoutError):
        place = error.filename or huggingface_hub.constants.HF_HUB_CACHE
        return f"cannot be kept in the cache: {error.strerror} ({place}); fix that, or set HF_HOME to another place"
    if status is None:
        return f"the download broke off ({one_line(error)}); try again: the files that are whole are kept"
    return f"the hub answers: {one_line(error)}; give a local folder"
