"""Directories of results derived from a file: made once, named by what they depend on, whole or absent."""

import hashlib
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

ABANDONED_AFTER = 24 * 3600  # seconds without a write after which another machine's build counts as dead


def source_key(path: Path, *options: object) -> str:
    """A directory name standing for this state of a file (path, size, modification time) and the options."""
    state = Path(path).stat()
    identity = [str(Path(path).resolve()), state.st_size, state.st_mtime_ns, *options]
    return hashlib.sha256(json.dumps(identity).encode("utf-8")).hexdigest()[:24]


def cached_directory(
    cache_dir: Path, name: str, build: Callable[[Path], None], fault: Callable[[Path], str | None]
) -> Path:
    """`cache_dir/name`, made by `build(empty directory)` unless it is there and `fault(directory)` is None.

    It is built beside its place and renamed into it, so a killed build leaves nothing that looks like a cache, and of
    two processes that build at once the first to finish provides it for both. ValueError if `cache_dir` is unusable.
    """
    target = cache_dir / name
    if target.is_dir():
        found = fault(target)
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
        _publish(work, target, fault)
    except OSError as error:
        if error.errno is None:  # our own FileNotFoundError about the source
            raise
        raise ValueError(f"{work} cannot be written ({error.strerror}); choose another --cache-dir") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


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
