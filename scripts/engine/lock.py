"""One process at a time writes a run."""

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    def _seize(descriptor: int) -> None:
        os.lseek(descriptor, 4096, os.SEEK_SET)  # a locked byte cannot be read, and there is a name to be read
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
else:

    def _seize(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked(path: Path, flag: str = "--run-name") -> Iterator[None]:
    """Hold `path`, a file made for it and deleted after it; ValueError if another process does. flag: what to give
    another of.

    The system gives a lock back when its holder ends, in whatever way: the file that a killed one leaves holds nobody
    up. Folders made for it are deleted again if nothing else has come into them.
    """
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    try:
        descriptor = _opened(path, flag)
        try:
            yield
        finally:
            with suppress(OSError):  # Windows deletes no open file
                path.unlink()
            os.close(descriptor)
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def _opened(path: Path, flag: str) -> int:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _seize(descriptor)
        except OSError as error:
            if not isinstance(error, BlockingIOError | PermissionError):  # a file system that has no locks
                why = f"cannot be locked ({error.strerror})"
                print(f"note: {path} {why}; start no other command of this run", file=sys.stderr)
                return descriptor
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip()
            os.close(descriptor)
            raise ValueError(
                f"{path}: {holder or 'another process'} is at this run; wait for its end, stop it, "
                f"or choose another {flag}"
            ) from None
        with suppress(OSError):  # its last holder has deleted it meanwhile: then it is nobody's, and not where it was
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        os.close(descriptor)
