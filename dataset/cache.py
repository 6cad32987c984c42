"""Directories of results derived from a file: made once, named by what they depend on, whole or absent. The SHA-256 of
each of their files lies with them and is compared at every opening, so that no later change passes for data.

Arrays in them are flat files, appended to while they are made and mapped when they are read, so that neither takes
memory in proportion to their length.
"""

import hashlib
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

ABANDONED_AFTER = 24 * 3600  # seconds without a write after which another machine's build counts as dead
CHECKSUMS = "checksums.json"
STRETCH = 2**15  # entries of a long array that are looked at together


def source_key(path: Path, *options: object) -> str:
    """A directory name standing for this state of a file (path, size, modification time) and the options."""
    state = Path(path).stat()
    identity = [str(Path(path).resolve()), state.st_size, state.st_mtime_ns, *options]
    return hashlib.sha256(json.dumps(identity).encode("utf-8")).hexdigest()[:24]


def cached_directory(
    cache_dir: Path, name: str, build: Callable[[Path], None], fault: Callable[[Path], str | None]
) -> Path:
    """`cache_dir/name`, made by `build(empty directory)` unless it is there, unchanged, and `fault(directory)` is None.

    It is built beside its place and renamed into it, so a killed build leaves nothing that looks like a cache, and of
    two processes that build at once the first to finish provides it for both. ValueError if `cache_dir` is unusable.
    """
    target = cache_dir / name

    def fault_or_change(folder: Path) -> str | None:
        return fault(folder) or _change(folder)

    if target.is_dir():
        found = fault_or_change(target)
        if found is None:
            return target
        print(f"{target} is damaged ({found}); building it again", file=sys.stderr)
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(cache_dir)
        work = _work_directory(cache_dir, name)
        work.mkdir()
    except OSError as error:
        raise ValueError(f"{cache_dir} cannot be written ({error.strerror}); choose another --cache-dir") from error
    try:
        build(work)
        _write_checksums(work)
        _publish(work, target, fault_or_change)
    except OSError as error:
        if error.errno is None:  # our own FileNotFoundError about the source
            raise
        raise ValueError(f"{work} cannot be written ({error.strerror}); choose another --cache-dir") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _write_checksums(folder: Path) -> None:
    """And have all files on the disk, before a name says that they are there."""
    text = json.dumps(_checksums(path for path in folder.iterdir() if not path.name.startswith(".")), indent=1)
    with (folder / CHECKSUMS).open("w", encoding="utf-8") as file:
        file.write(text)
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _change(folder: Path) -> str | None:
    """Which file of the directory is not as it was written, or None."""
    try:
        written = json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))
        # Only files that were written: a system may add its own, such as .DS_Store or .nfs0001.
        found = _checksums(folder / name for name in written)
        changed = sorted(name for name in written if written[name] != found[name])
    except (OSError, ValueError, AttributeError) as error:
        return f"unreadable: {error!r}"
    return f"{changed[0]} is not as it was written" if changed else None


def _checksums(paths: Iterable[Path]) -> dict[str, str]:
    found = {}
    for path in paths:
        with path.open("rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


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
        """Write `values` (N,) behind what array `name` holds; OSError, with its errno, where the disk takes no more."""
        # Not ndarray.tofile, whose OSError does not say why.
        self._files[name].write(np.ascontiguousarray(values, dtype=self.dtypes[name]).data)
        self.lengths[name] += len(values)


def cached_arrays(
    path: Path,
    cache_dir: Path,
    options: tuple,
    dtypes: Mapping[str, Any],
    fill: Callable[[ArrayFiles], dict[str, Any]],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(arrays, meta) made of the file `path` with these options, the arrays mapped from `cache_dir`.

    Unless they are there, fill(files) appends to the arrays named in `dtypes` and returns meta, which JSON can hold.
    ValueError if `cache_dir` is unusable, or if `path` changes meanwhile.
    """

    def build(folder: Path) -> None:
        with unchanged(path), ArrayFiles(folder, dtypes) as files:
            meta = fill(files)
        kinds = {name: [files.dtypes[name].name, files.lengths[name]] for name in dtypes}
        (folder / "meta.json").write_text(json.dumps({"arrays": kinds, **meta}, indent=1), encoding="utf-8")

    folder = cached_directory(Path(cache_dir), source_key(path, *options), build, _arrays_fault)
    meta = read_meta(folder)
    return {name: map_array(folder / name, dtype) for name, (dtype, _) in meta.pop("arrays").items()}, meta


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """ValueError at the end if the file has another size or time than at the beginning."""
    before = Path(path).stat()
    yield
    after = Path(path).stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"{path} changed while it was read; run again when it is complete")


def read_meta(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))


def map_array(path: Path, dtype: Any) -> np.ndarray:
    """The entries of a flat file, read when they are looked at; the system may take their memory back at any time."""
    # An empty file cannot be mapped. An np.memmap makes np.memmaps of its parts, slowly.
    return np.memmap(path, dtype, mode="r").view(np.ndarray) if path.stat().st_size else np.zeros(0, dtype)


def stretches(count: int) -> Iterator[np.ndarray]:
    """The numbers from 0 to below `count`, STRETCH at a time."""
    for begin in range(0, count, STRETCH):
        yield np.arange(begin, min(begin + STRETCH, count))


def fault_of_sizes(folder: Path, sizes: Callable[[dict[str, Any]], dict[str, int]]) -> str | None:
    """What is wrong with a cache directory of flat files, of which sizes(meta) says the bytes, or None."""
    try:
        for name, size in sizes(read_meta(folder)).items():
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, expected {size}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"unreadable: {error!r}"
    return None


def _arrays_fault(folder: Path) -> str | None:
    def sizes(meta: dict[str, Any]) -> dict[str, int]:
        return {name: np.dtype(dtype).itemsize * length for name, (dtype, length) in meta["arrays"].items()}

    return fault_of_sizes(folder, sizes)


def _publish(work: Path, target: Path, fault: Callable[[Path], str | None]) -> None:
    for _ in range(5):
        try:
            os.rename(work, target)
            return
        except OSError:
            if not target.is_dir():
                raise
        if fault(target) is None:
            return  # another process was faster; its cache says the same
        # Moved away rather than deleted in place: nobody must meet a half-deleted directory.
        discarded = _work_directory(target.parent, target.name)
        try:
            os.rename(target, discarded)
        except FileNotFoundError:
            continue  # another process moved it first
        shutil.rmtree(discarded, ignore_errors=True)
    raise ValueError(f"{target} cannot be replaced; delete it and run again")


def _work_directory(cache_dir: Path, name: str) -> Path:
    """A new name that tells who builds there: NAME-HOST-PID-RANDOM.building."""
    return cache_dir / f"{name}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}.building"


def _host() -> str:
    try:  # containers may share their machine's name, but not its process ids
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    return hashlib.sha256(f"{socket.gethostname()} {processes}".encode()).hexdigest()[:8]


def _remove_abandoned(cache_dir: Path) -> None:
    for work in cache_dir.glob("*.building"):
        if _is_abandoned(work):
            shutil.rmtree(work, ignore_errors=True)


def _is_abandoned(work: Path) -> bool:
    """Whether the process that builds in this directory is gone; on other machines, judged by age."""
    try:
        _, host, pid, _ = work.stem.split("-")
        newest = max(entry.stat().st_mtime for entry in (work, *work.iterdir()))
    except (OSError, ValueError):
        return False  # not named by us, or just finished
    if host == _host() and os.name == "posix":  # on Windows os.kill(pid, 0) would end the process
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return True
        except (OSError, ValueError):
            pass  # alive but another user's, or not a process id
    return time.time() - newest > ABANDONED_AFTER
