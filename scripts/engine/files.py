"""Result files, each of which appears whole or not at all."""

import errno
import hashlib
import json
import math
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from model.files import replacing

TOKENIZER_FILES = "tokenizer.json", "tokenizer_config.json"
NO_LOCKS = errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP  # errors of file systems without locks


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


def require_writable(path: Path, flag: str) -> None:
    """ValueError if no file can be written at `path`; found out before the work, not after it. Makes nothing."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{flag}: {path} cannot be written; choose another place")


def or_none(value: float) -> float | None:
    """JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def read_log(path: Path) -> list[dict]:
    return [json.loads(line) for line in lines_of(path)]


def lines_of(path: Path) -> list[str]:
    """Cut at line feeds alone: str.splitlines also cuts at characters that JSON strings may hold (U+2028, U+0085)."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


@contextmanager
def locked(path: Path, flag: str = "--run-name") -> Iterator[None]:
    """Hold the lock file `path`. ValueError, with the name of the holder, if another process does; flag: what to give
    another of.

    The system releases a lock when its process ends, so the file that a killed one leaves blocks nobody. At the end the
    file is deleted, with the folders that were made for it if nothing else has come into them.
    """
    new_folders = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, blocking=False, fallback_to_soft=False)
    try:
        _acquire(lock, path, flag)
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows deletes no open file
                path.unlink()
            lock.release()
        for folder in new_folders:
            with suppress(OSError):
                folder.rmdir()


def _acquire(lock: FileLock, path: Path, flag: str) -> None:
    try:
        lock.acquire()
        path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    except Timeout:
        holder = ""
        with suppress(OSError):  # Windows lets nobody read a locked file
            holder = path.read_text(errors="replace")[:200].strip()
        raise ValueError(
            f"{path}: this run is in use by {holder or 'another process'}; wait for its end, stop it, "
            f"or choose another {flag}"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"note: {path} cannot be locked ({error.strerror}); start no other command of this run", file=sys.stderr)
