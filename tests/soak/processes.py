"""Commands as processes that are killed, or lose their disk, at a chosen moment."""

import errno
import importlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from tqdm import tqdm

from scripts.engine import cli

ROOT = Path(__file__).parents[2]
# Loaded once, by the process that the others are forked from. Optimizers load torch._dynamo, plots the renderer.
PRELOAD = [
    __name__,
    "scripts.train.train_pretrain",
    "scripts.train.diffusion",
    "scripts.train.train_sft_diffusion",
    "tests.soak.faults",
    "torch._dynamo",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
]
PATIENCE = 120  # seconds after which a command counts as hanging


@cache
def forks() -> Any:
    """The context of processes that are forked from one which has loaded everything and runs no thread, so that they
    start at once. ValueError on systems that cannot fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise ValueError("processes cannot be forked on this system; run this on Linux or macOS")
    context = multiprocessing.get_context("forkserver")
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    with patch.dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    first = context.Process(target=nothing)  # waits until everything is loaded
    first.start()
    first.join()
    return context


# Before anything is started, so that whoever preloads more can add to it.
if "forkserver" in multiprocessing.get_all_start_methods():
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)


class Ended(NamedTuple):
    """Exit code and output of a command; code None: it hung and was killed for it."""

    code: int | None
    out: str
    err: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Command:
    """A command at work in `folder`, forked and prepared by `disturbance()`, its output in files there."""

    def __init__(
        self,
        folder: Path,
        module: str,
        argv: Sequence[str],
        disturbance: Callable[[], None] | None = None,
        name: str = "command",
        environment: dict[str, str] | None = None,
    ):
        self.outputs = folder / f"{name}_out.txt", folder / f"{name}_err.txt"
        for path in self.outputs:
            path.write_bytes(b"")
        outputs = tuple(map(str, self.outputs))
        arguments = str(folder), module, list(argv), disturbance, outputs, environment or {}
        self.process = forks().Process(target=_run, args=arguments, daemon=True)
        self.process.start()

    @property
    def code(self) -> int | None:
        return self.process.exitcode

    def wait(self, seconds: float = PATIENCE) -> Ended:
        """Wait until it ends; kill it after `seconds`."""
        self.process.join(seconds)
        code = self.code
        if code is None:
            self.kill()
            self.process.join()
        out, err = (path.read_text(encoding="utf-8") for path in self.outputs)
        return Ended(code, out, err)

    def kill(self) -> None:
        self.process.kill()


def start_together(
    folder: Path, module: str, argv: Sequence[str], disturbances: Sequence[Callable[[], None]]
) -> list[Command]:
    """The processes of one training as torchrun starts them, one for each disturbance. As under torchrun, the store by
    which they find each other is in another process, this one."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(len(disturbances)),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    commands = []
    for rank, disturbance in enumerate(disturbances):
        environment = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        commands.append(Command(folder, module, argv, disturbance, f"rank{rank}", environment))
        commands[-1].store = store  # lives as long as the command
    return commands


def _run(
    folder: str,
    module: str,
    argv: list[str],
    disturbance: Callable[[], None] | None,
    outputs: tuple[str, str],
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    for stream, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), stream)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.argv = [module, *argv]
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # the usual one is a semaphore of the system, which a kill would leave behind
    if disturbance:
        disturbance()
    cli.run(importlib.import_module(module).main, argv)


# -- what may happen to a command --------------------------------------------------------------------------------------


def nothing() -> None:
    pass


def written_path(event: str, arguments: tuple, folder: Path) -> str | None:
    """The path below `folder` that an audit event opens for writing, renames or deletes; None for other events."""
    opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if not opened and event not in ("os.rename", "os.remove"):
        return None
    if not isinstance(arguments[0], (str, bytes, os.PathLike)):
        return None
    path = os.fsdecode(arguments[0])
    return path if os.path.abspath(path).startswith(str(folder)) else None


@dataclass(frozen=True)
class Disturbance:
    """Do `action` just before the `number`-th file operation below `folder` (0: never).

    An operation opens a file for writing, renames or deletes it. Those up to the `number`-th are listed in `record`.
    """

    folder: Path
    record: Path
    number: int = 0
    action: Callable[[], None] = nothing

    def __call__(self) -> None:
        numbers = itertools.count(1)
        record = os.open(self.record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

        def audit(event: str, arguments: tuple) -> None:
            path = written_path(event, arguments, self.folder)
            if path is None:
                return
            number = next(numbers)
            if number <= self.number or not self.number:  # after the action there may be no room for the record
                os.write(record, f"{event} {path}\n".encode())
            if number == self.number:
                self.action()

        sys.addaudithook(audit)


@dataclass(frozen=True)
class Kill:
    """SIGKILL to this process after `delay` seconds."""

    delay: float = 0.0

    def __call__(self) -> None:
        if self.delay:
            timer = threading.Timer(self.delay, Kill())
            timer.daemon = True
            timer.start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Forbid:
    """From here on, every file operation below `folder` is refused, as in a folder that may not be written."""

    folder: Path

    def __call__(self) -> None:
        def refuse(event: str, arguments: tuple) -> None:
            if path := written_path(event, arguments, self.folder):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

        sys.addaudithook(refuse)


@dataclass(frozen=True)
class FilesUpTo:
    """From here on, no file grows beyond `size` bytes: a full disk, with EFBIG for ENOSPC."""

    size: int

    def __call__(self) -> None:
        _limit(self.size)
        sys.stdout, sys.stderr = Unlimited(sys.stdout, self.size), Unlimited(sys.stderr, self.size)


class Unlimited:
    """A stream to a file that may grow although others may not, so that messages come through."""

    def __init__(self, stream: Any, size: int):
        self._stream, self._size = stream, size

    def write(self, text: str) -> int:
        _limit(None)
        try:
            written = self._stream.write(text)
            self._stream.flush()
        finally:
            _limit(self._size)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _limit(size: int | None) -> None:
    import resource  # not on Windows

    soft = resource.RLIM_INFINITY if size is None else size
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, resource.RLIM_INFINITY))
