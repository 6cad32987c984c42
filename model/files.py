"""Files that are replaced whole, and what the system's errors mean."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a new file that replaces `path`, or the file that it links to, when the block ends.

    Whatever happens, `path` is the old file or the new one, whole. After an error it is the old one; errors of the
    system are raised again as an OSError that names it."""
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        fault = _system_error(error)
        if fault is None:
            raise
        raise OSError(
            f"{path} cannot be written ({fault.strerror}), and is left as it was; make room, or choose another place"
        ) from error
    if os.name == "posix":  # the new name, too, must survive a power cut; Windows has no such call for folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _system_error(error: BaseException | None) -> OSError | None:
    """Return the system's error that caused `error`: torch's writer raises one of its own."""
    while error is not None and not (isinstance(error, OSError) and error.errno):
        error = error.__cause__ or error.__context__
    return error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out; torch raises a plain RuntimeError for it."""
    if isinstance(error, RuntimeError):
        return bool(re.search("out of memory|can't allocate memory", str(error)))
    return isinstance(error, MemoryError)
