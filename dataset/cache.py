"""Directories of files derived from a data file: built once, named by what they depend on, whole or absent.

Arrays in them are flat files, appended to during the build and memory-mapped when they are read, so that neither takes
memory in proportion to their length.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

RECORD = "files.json"  # states and hashes of the files of a directory
STRETCH = 2**15  # entries of a long array that are processed together


def source_key(files: Iterable[Path], *options: object) -> str:
    """A directory name for this state of files (path, size, modification time of each) and these options."""
    states = [part for file in files for part in (str(Path(file).resolve()), *file_state(file))]
    identity = [*states, *options]
    return hashlib.sha256(json.dumps(identity).encode("utf-8")).hexdigest()[:24]


def file_state(path: Path) -> list[int]:
    """Size in bytes and modification time in nanoseconds."""
    stat = Path(path).stat()
    return [stat.st_size, stat.st_mtime_ns]


@contextmanager
def unchanged(files: Sequence[Path]) -> Iterator[None]:
    """Raise ValueError at the end if the size or time of a file has changed since the beginning."""
    before = [*map(file_state, files)]
    yield
    for file, state in zip(files, before, strict=True):
        if file_state(file) != state:
            raise ValueError(f"{file} changed while it was read; run again when it is complete")


def cached_directory(cache_dir: Path, name: str, build: Callable[[Path], None]) -> Path:
    """Return `cache_dir/name`, made by `build(empty directory)` unless it is there and as it was built.

    It is built beside its place and renamed into it, so a killed build leaves nothing that looks like a cache. Of two
    processes that need the same directory, the second waits for the first. ValueError if `cache_dir` is unusable.
    """
    target = cache_dir / name
    if _is_whole(target):
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        for work in cache_dir.glob("*.building"):
            with suppress(Timeout), FileLock(work.with_suffix(".lock"), timeout=0):  # a live build holds its lock
                shutil.rmtree(work, ignore_errors=True)
        with _locked(target):
            if not _is_whole(target):  # else another process has built it meanwhile
                _build(target, build)
    except OSError as error:
        if error.errno is None:  # raised by `build`: the data file does not exist
            raise
        raise ValueError(f"{cache_dir} cannot be written ({error.strerror}); choose another --cache-dir") from error
    return target


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock of a directory; the system releases it when the process ends, in whatever way."""
    lock = FileLock(target.with_name(f"{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process builds {target}; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(target: Path, build: Callable[[Path], None]) -> None:
    if target.exists():
        print(f"{target} is damaged; building it again", file=sys.stderr)
        shutil.rmtree(target)
    work = target.with_name(f"{target.name}.building")
    work.mkdir()
    try:
        build(work)
        names = [path.name for path in work.iterdir() if not path.name.startswith(".")]  # the system may add its own
        for name in names:  # on the disk, before a name says that they are there
            with (work / name).open("rb+") as file:
                os.fsync(file.fileno())
        _write_record(work, _hashes(work, names))
        os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _is_whole(folder: Path) -> bool:
    """Whether the files of a directory are as they were built.

    They are hashed only if the size or time of one has changed: hashing 20 GB at every start would take a minute.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        hashes = record["sha256"]
        if _states(folder, hashes) == record["states"]:
            return True
        whole = _hashes(folder, hashes) == hashes
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if whole:  # copied, for example: the same bytes at another time
        with suppress(OSError):
            _write_record(folder, hashes)
    return whole


def _states(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    return {name: file_state(folder / name) for name in names}


def _hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    return {name: _sha256(folder / name) for name in names}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_record(folder: Path, hashes: dict[str, str]) -> None:
    record = {"states": _states(folder, hashes), "sha256": hashes}
    partial = folder / f".{RECORD}.{os.getpid()}"
    partial.write_text(json.dumps(record, indent=1), encoding="utf-8")
    partial.replace(folder / RECORD)


class ArrayFiles:
    """One-dimensional arrays that grow on disk: `folder/name` holds the entries of array `name` and nothing else."""

    def __init__(self, folder: Path, dtypes: Mapping[str, Any]):
        self.dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        self.lengths = dict.fromkeys(dtypes, 0)
        self._stack = ExitStack()
        self._files = {name: self._stack.enter_context((folder / name).open("wb")) for name in dtypes}

    def __enter__(self) -> "ArrayFiles":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def append(self, name: str, values: np.ndarray) -> None:
        """Append `values` (N,) to array `name`; OSError, with its errno, if the disk is full."""
        # Not ndarray.tofile, whose OSError does not say why.
        self._files[name].write(np.ascontiguousarray(values, dtype=self.dtypes[name]).data)
        self.lengths[name] += len(values)

    def clear(self) -> None:
        """Empty all arrays."""
        for name, file in self._files.items():
            file.seek(0)
            file.truncate()
            self.lengths[name] = 0


def map_array(path: Path, dtype: Any) -> np.ndarray:
    """The entries of a flat file, read from disk when they are used."""
    # An empty file cannot be mapped. Slicing an np.memmap makes further np.memmaps, slowly.
    return np.memmap(path, dtype, mode="r").view(np.ndarray) if path.stat().st_size else np.zeros(0, dtype)


def stretches(count: int) -> Iterator[np.ndarray]:
    """The numbers from 0 to below `count`, STRETCH at a time."""
    for begin in range(0, count, STRETCH):
        yield np.arange(begin, min(begin + STRETCH, count))
