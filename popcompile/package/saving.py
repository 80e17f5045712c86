"""Keep in a package's report what was measured of it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from popcompile.errors import PopcompileError
from popcompile.loading import read_json
from popcompile.package.manifest import MANIFEST, REPORT, Manifest, file_sha256, read_manifest
from popcompile.package.staging import link_or_copy, require_writable, staged


def require_saveable(folder: Path) -> None:
    """Check, before any work, that `save_in_report` can write. Raises PopcompileError."""
    read_manifest(folder)
    require_writable(folder.resolve(), force=True, copied=True)


def save_in_report(folder: Path, manifest: Manifest, key: str, content: Any) -> None:
    """Put `content` under `key` of the package's report.json, in place of what was there.

    The report's hash stands in the manifest, so the two change together: a copy of the package, of hard links to its
    other files, takes the package's place in one step (staging.staged). manifest: the one that `content` was measured
    with. Raises PopcompileError where the package is another by now or the place cannot be written.
    """
    if read_manifest(folder) != manifest:
        raise PopcompileError(f"{folder}: the package was replaced meanwhile, nothing was saved; measure it again")
    place = folder.resolve()
    with staged(place, force=True, copied=True) as copy:
        shutil.copytree(place, copy, symlinks=True, copy_function=link_or_copy, dirs_exist_ok=True)
        report = read_json(str(folder), copy / REPORT) | {key: content}
        path = _rewrite(copy / REPORT, json.dumps(report, indent=2) + "\n")
        files = manifest.files | {REPORT: {"size": path.stat().st_size, "sha256": file_sha256(path)}}
        _rewrite(copy / MANIFEST, replace(manifest, files=files).to_json())


def _rewrite(path: Path, text: str) -> Path:
    """Write a new file at `path`; one that is there may be a hard link and stays as it is elsewhere."""
    path.unlink()
    path.write_text(text, encoding="utf-8")
    return path
