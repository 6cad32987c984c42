"""Result files, each of which appears whole or not at all."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from model.checkpoint import replacing


def write_bytes(path: Path, content: bytes) -> None:
    """Atomically and durably, its folder made; OSError names `path`, which is then as it was."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    # What is no Unicode, such as half of a surrogate pair in the name of a file, JSON spells as backslashreplace does.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """What is no finite number becomes null: JSON has no other word for it."""
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), indent=indent, ensure_ascii=False)
    write_text(path, text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
