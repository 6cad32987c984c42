"""Directories of files derived from a data file: built once, named by what they depend on, whole or absent.

Arrays in them are flat files, appended to during the build and memory-mapped when they are read, so that neither takes
memory in proportion to their length.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

RECORD = "files.json"  # size, modification time and SHA-256 of every file of a directory
STRETCH = 2**15  # entries of a long array that are processed together


def source_key(path: Path, *options: object) -> str:
    """A directory name for this state of a file (path, size, modification time) and these options."""
    state = Path(path).stat()
    identity = [str(Path(path).resolve()), state.st_size, state.st_mtime_ns, *options]
    return hashlib.sha256(json.dumps(identity).encode("utf-8")).hexdigest()[:24]


def cached_directory(cache_dir: Path, name: str, build: Callable[[Path], None]) -> Path:
    """Return `cache_dir/name`, made by `build(empty directory)` unless it is there and as it was built.

    It is built beside its place and renamed into it, so a killed build leaves nothing that looks like a cache. Of two
    processes that need the same directory, the second waits for the first. ValueError if `cache_dir` is unusable.
    """
    target = cache_dir / name
    if _fault(target) is None:
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_killed_builds(cache_dir)
        with _locked(target):
            fault = _fault(target)
            if fault is not None:  # else another process has built it meanwhile
                _replace(target, fault, build)
    except OSError as error:
        if error.errno is None:  # raised by `build`: the data file does not exist
            raise
        raise ValueError(f"{cache_dir} cannot be written ({error.strerror}); choose another --cache-dir") from error
    return target


def _replace(target: Path, fault: str, build: Callable[[Path], None]) -> None:
    if target.exists():
        print(f"{target} is damaged ({fault}); building it again", file=sys.stderr)
        shutil.rmtree(target)
    work = _beside(target, "building")
    work.mkdir()
    try:
        build(work)
        paths = [path for path in work.iterdir() if not path.name.startswith(".")]  # the system may add its own
        for path in paths:  # on the disk, before a name says that they are there
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        _write_record(work, {path.name: {**_state(path), "sha256": _sha256(path)} for path in paths})
        os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock of a directory; the system releases it when the process ends, in whatever way."""
    lock = FileLock(_beside(target, "lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process builds {target}; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _remove_killed_builds(cache_dir: Path) -> None:
    for work in cache_dir.glob("*.building"):
        with suppress(Timeout), FileLock(work.with_suffix(".lock"), timeout=0):  # a live build holds its lock
            shutil.rmtree(work, ignore_errors=True)


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f"{target.name}.{suffix}")


def _fault(folder: Path) -> str | None:
    """What is wrong with a cached directory, None if nothing is.

    A file is read only if its size or modification time is not the recorded one: hashing 20 GB at every start would
    take a minute.
    """
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        touched = {}
        for name, entry in record.items():
            state = _state(folder / name)
            if state.items() <= entry.items():
                continue
            if state["size"] != entry["size"] or _sha256(folder / name) != entry["sha256"]:
                return f"{name} is not as it was written"
            touched[name] = entry | state
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable: {error!r}"
    if touched:  # copied, for example: the same bytes at another time
        with suppress(OSError):
            _write_record(folder, record | touched)
    return None


def _state(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "modified_ns": stat.st_mtime_ns}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_record(folder: Path, record: dict[str, Any]) -> None:
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


def cached_arrays(
    path: Path,
    cache_dir: Path,
    options: tuple,
    dtypes: Mapping[str, Any],
    fill: Callable[[ArrayFiles], dict[str, Any]],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, meta) made from the file `path` with these options, the arrays mapped from `cache_dir`.

    Unless they are there, fill(files) appends to the arrays named in `dtypes` and returns meta, which must fit JSON.
    ValueError if `cache_dir` is unusable, or if `path` changes meanwhile.
    """

    def build(folder: Path) -> None:
        with unchanged(path), ArrayFiles(folder, dtypes) as files:
            meta = fill(files)
        types = {name: dtype.name for name, dtype in files.dtypes.items()}
        (folder / "meta.json").write_text(json.dumps({"arrays": types, **meta}, indent=1), encoding="utf-8")

    folder = cached_directory(Path(cache_dir), source_key(path, *options), build)
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return {name: _map_array(folder / name, dtype) for name, dtype in meta.pop("arrays").items()}, meta


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Raise ValueError at the end if the file's size or time has changed since the beginning."""
    before = _state(path)
    yield
    if _state(path) != before:
        raise ValueError(f"{path} changed while it was read; run again when it is complete")


def _map_array(path: Path, dtype: str) -> np.ndarray:
    """The entries of a flat file, read from disk when they are used."""
    # An empty file cannot be mapped. Slicing an np.memmap makes further np.memmaps, slowly.
    return np.memmap(path, dtype, mode="r").view(np.ndarray) if path.stat().st_size else np.zeros(0, dtype)


def stretches(count: int) -> Iterator[np.ndarray]:
    """The numbers from 0 to below `count`, STRETCH at a time."""
    for begin in range(0, count, STRETCH):
        yield np.arange(begin, min(begin + STRETCH, count))
