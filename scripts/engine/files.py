"""Result files, each of which appears whole or not at all."""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

from model.checkpoint import replacing
from scripts.engine.training.run import require_writable

TOKENIZER_FILES = "tokenizer.json", "tokenizer_config.json"


def require_output(path: Path | None, flag: str, *inputs: Path | str | None) -> None:
    """ValueError, before the work, if no file can be written at `path`, or if it is one of the files that the command
    reads. None: nothing is written, or read. A folder among the inputs is that of a tokenizer."""
    if path is None:
        return
    require_writable(path, flag)
    for one in map(Path, filter(None, inputs)):
        for file in [one / name for name in TOKENIZER_FILES] if one.is_dir() else [one]:
            if path.exists() and file.exists() and path.samefile(file):
                raise ValueError(f"{flag} {path} is a file that the command reads ({file}); choose another place")


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
