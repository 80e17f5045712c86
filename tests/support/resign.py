"""A package that was changed by someone who knows how manifests are made: every hash is right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from popcompile.package.integrity import describe_files
from popcompile.package.manifest import _CHECKSUM, MANIFEST, _checksum


def sign(package: Path, **changes: Any) -> None:
    """Write the manifest anew, for the files that are there and with `changes` of its fields, however wrong."""
    content = json.loads((package / MANIFEST).read_text())
    del content[_CHECKSUM]
    (package / MANIFEST).unlink()
    content["files"] = describe_files(package, content["weights"])
    content |= changes
    (package / MANIFEST).write_text(json.dumps(content | {_CHECKSUM: _checksum(content)}))
