"""Files that are replaced whole, what the system's errors mean, and what is where a checkpoint was expected."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
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


# How files begin that people take for checkpoints, and what to do about them.
TAKEN_FOR_CHECKPOINTS = {
    b"version https://git-lfs": "is the pointer of Git LFS to a file that was not fetched; run git lfs pull there",
    b"GGUF": "is a GGUF file; give the safetensors or torch file that it was made from",
    b"<": "is a web page; download the file itself",
    b"{": "is JSON; give the file of the weights",
}
NO_CHECKPOINT = "is not a checkpoint of tensors and plain values; it may hold code, and is not opened"
DAMAGED = "is damaged or not a torch checkpoint; copy it again, or use the run's other files"


def checkpoint_fault(path: Path, otherwise: str) -> str:
    """Return what the file at `path`, which cannot be read as a checkpoint, is instead."""
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    binary = b"\0" in head and not head.startswith(b"GGUF")  # may begin with any byte
    found = (fault for start, fault in TAKEN_FOR_CHECKPOINTS.items() if head.startswith(start) and not binary)
    return f"{path} {next(found, otherwise) if head else 'is empty; copy it again'}"


def no_checkpoint(path: Path) -> str:
    """Return why no checkpoint file is at `path`, and what may have been meant."""
    folder = path if path.is_dir() else path.parent
    files = sorted(folder.glob("*.pt"), key=lambda file: (not file.name.endswith("_state_dict.pt"), file.name))
    if path.is_dir():
        if files:
            return f"{path} is a folder; give one of the checkpoints in it, such as {files[0]}"
        if (path / "config.json").is_file():
            return (
                f"{path} is a folder of another program's weights, which the training commands read with --load-from; "
                "this takes a file that training wrote, <run>_state_dict.pt"
            )
        return f"{path} is a folder, and no checkpoint is in it; give a file that training wrote, <run>_state_dict.pt"
    names = [file.name for file in files]
    near = [name for name in names if name.startswith(path.stem)] or get_close_matches(path.name, names, cutoff=0.8)
    if near:
        return f"there is no checkpoint {path}; did you mean {folder / near[0]}?"
    return f"there is no checkpoint {path}; training writes <run>_state_dict.pt, and --save-dir says where"
