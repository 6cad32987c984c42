"""Files of commands: results that appear whole or not at all, logs, and locks."""

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
    """Raise ValueError, before the work, if no file can be written at `path`, or if the command reads that file.

    None stands for nothing to write or read. A folder among the inputs is that of a tokenizer.
    """
    if path is None:
        return
    require_writable(path, flag)
    for source in map(Path, filter(None, inputs)):
        for file in [source / name for name in TOKENIZER_FILES] if source.is_dir() else [source]:
            if path.exists() and file.exists() and path.samefile(file):
                raise ValueError(f"{flag} {path} is a file that the command reads ({file}); choose another place")


def write_bytes(path: Path, content: bytes) -> None:
    """Write atomically and durably, and make the folder; after an OSError, which names `path`, it is as it was."""
    with replacing(path) as file:
        file.write(content)


def write_text(path: Path, text: str) -> None:
    # Lone surrogates, from odd file names, become backslash escapes, as in JSON.
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, value: Any, indent: int | None = 1) -> None:
    """Write JSON; numbers that are not finite become null, since JSON has no NaN."""
    try:
        text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        text = json.dumps(_finite(value), indent=indent, ensure_ascii=False)
    write_text(path, text + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_writable(path: Path, flag: str) -> None:
    """Raise ValueError, before the work, if no file can be written at `path`. Creates nothing."""
    folder = path.parent
    while not folder.exists():
        folder = folder.parent
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{flag}: {path} cannot be written; choose another place")


def or_none(value: float) -> float | None:
    """Return the value if it is finite, else None: JSON has no infinity and no NaN."""
    return value if math.isfinite(value) else None


def read_log(path: Path) -> list[dict]:
    """Return the events of a run's log."""
    return [json.loads(line) for line in lines_of(path)]


def lines_of(path: Path) -> list[str]:
    """Return the lines of a text, cut at line feeds alone: str.splitlines also cuts at U+2028 and others, which JSON
    strings may hold."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


@contextmanager
def locked(path: Path, flag: str = "--run-name") -> Iterator[None]:
    """Hold the lock file `path`; raise ValueError, with the name of its holder, if another process holds it.

    flag: chooses another place. The system releases a lock when its process ends, so the file that a killed process
    leaves blocks nobody. At the end the file is deleted, and so are the folders that were made for it and are empty.
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
        with suppress(PermissionError):  # Windows writes to no locked file
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    except Timeout:
        holder = ""
        with suppress(OSError):  # Windows reads no locked file
            holder = path.read_text(errors="replace")[:200].strip()
        raise ValueError(
            f"{path}: this run is in use by {holder or 'another process'}; wait for its end, stop it, "
            f"or choose another {flag}"
        ) from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"note: {path} cannot be locked ({error.strerror}); start no other command of this run", file=sys.stderr)
