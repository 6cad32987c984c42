"""Commands as processes that can be killed, or lose their disk, at a chosen moment."""

import ctypes
import importlib
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from scripts.engine import cli

ROOT = Path(__file__).parents[2]
# Loaded once, by the process that the others are forked from. Optimizers load torch._dynamo, plots the renderer.
PRELOAD = [
    __name__,
    "scripts.train.train_pretrain",
    "scripts.train.diffusion",
    "scripts.train.train_sft_diffusion",
    "tests.soak.distributed",
    "tests.soak.places",
    "torch._dynamo",
    "matplotlib.pyplot",
    "matplotlib.backends.backend_agg",
]
PATIENCE = 120  # seconds after which a command counts as hanging
GLANCE = 0.0003  # seconds between two looks at a process or a folder
CAN_WRITE_ANYWHERE = 1  # CAP_DAC_OVERRIDE, as a bit number, of linux/capability.h


@cache
def forks() -> Any:
    """The context of processes that are forked from one which has loaded everything and runs no thread: a start costs
    no seconds. ValueError on systems that cannot fork."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise ValueError("processes cannot be forked on this system; run this on Linux or macOS")
    context = multiprocessing.get_context("forkserver")
    told = {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]), "OMP_NUM_THREADS": "1"}
    kept = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        forkserver.ensure_running()
    finally:
        for name, value in kept.items():
            os.environ.pop(name)
            os.environ.update({} if value is None else {name: value})
    first = context.Process(target=nothing)  # which waits until everything is loaded
    first.start()
    first.join()
    return context


# Before anything is started, so that whoever preloads more can add to it.
if "forkserver" in multiprocessing.get_all_start_methods():
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOAD)


class Ended(NamedTuple):
    """What a command has left; code None: it hung, and was killed for it."""

    code: int | None
    out: str
    err: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Command:
    """A command at work in `folder`, its output in files there. `alone`: started as users start it, seconds slower;
    otherwise forked, and prepared by `disturbance()` before it begins."""

    def __init__(
        self,
        folder: Path,
        module: str,
        argv: Sequence[str],
        disturbance: Callable[[], None] | None = None,
        alone: bool = False,
        name: str = "command",
        environment: dict[str, str] | None = None,
        keep: Any = None,
    ):
        """keep: what must not go before the command."""
        self.keep, self.outputs = keep, (folder / f"{name}_out.txt", folder / f"{name}_err.txt")
        for path in self.outputs:
            path.write_bytes(b"")
        if alone:
            with self.outputs[0].open("wb") as out, self.outputs[1].open("wb") as err:
                told = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(environment or {})}
                line = [sys.executable, "-m", module, *argv]
                self.process = subprocess.Popen(line, cwd=folder, env=told, stdout=out, stderr=err)
        else:
            arguments = str(folder), module, list(argv), disturbance, tuple(map(str, self.outputs)), environment or {}
            self.process = forks().Process(target=_work, args=arguments, daemon=True)
            self.process.start()

    @property
    def code(self) -> int | None:
        return self.process.poll() if isinstance(self.process, subprocess.Popen) else self.process.exitcode

    def wait(self, seconds: float = PATIENCE) -> Ended:
        """What it has left when it has ended; after `seconds` it is killed."""
        hangs = not self.ends_within(seconds)
        if hangs:
            self.kill()
            self.ends_within(PATIENCE)
        out, err = (path.read_text(encoding="utf-8") for path in self.outputs)
        return Ended(None if hangs else self.code, out, err)

    def ends_within(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while self.code is None and time.monotonic() < until:
            time.sleep(0.002)
        return self.code is not None

    def kill(self) -> None:
        self.process.kill()

    def kill_after(self, seconds: float) -> Ended:
        self.ends_within(seconds)
        self.kill()
        return self.wait()

    def kill_when_said(self, text: str, delay: float) -> Ended:
        """Kill it `delay` seconds after it has said so on standard output."""
        while self.code is None and text.encode() not in self.outputs[0].read_bytes():
            time.sleep(GLANCE)
        return self.kill_after(delay)

    def kill_in_save(self, folder: Path, number: int, delay: float) -> Ended:
        """Kill it `delay` seconds after it has begun to write its `number`-th temporary file below `folder`."""
        seen = temporaries(folder)
        while self.code is None and number:
            now = temporaries(folder)
            number -= bool(now - seen)
            seen = now
            time.sleep(GLANCE)
        return self.kill_after(delay)


def temporaries(folder: Path) -> set[tuple[str, int]]:
    """(name, inode) of the files in `folder` that are not yet under their names."""
    found = set()
    for entry in os.scandir(folder) if folder.is_dir() else ():
        if ".tmp" in entry.name:
            found.add((entry.name, entry.inode()))
    return found


def _work(
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


# -- what may happen to a forked command -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Disturbance:
    """Do `before` at once, and `action` just before the `number`-th file that the command opens for writing, renames or
    deletes below `folder`. The operations until then are told in the file `record`; number 0: all of them."""

    before: Callable[[], None]
    folder: Path
    record: Path
    number: int
    action: Callable[[], None]

    def __call__(self) -> None:
        self.before()
        below, numbers = str(self.folder.resolve()), itertools.count(1)
        record = os.open(self.record, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

        def heard(event: str, arguments: tuple) -> None:
            opened = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not opened and event not in ("os.rename", "os.remove"):
                return
            path = arguments[0]
            if isinstance(path, (str, bytes, os.PathLike)) and os.path.abspath(os.fsdecode(path)).startswith(below):
                number = next(numbers)
                if number <= self.number or not self.number:  # after the action it may be impossible
                    os.write(record, f"{event} {os.fsdecode(path)}\n".encode())
                if number == self.number:
                    self.action()

        sys.addaudithook(heard)


def nothing() -> None:
    pass


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class FilesUpTo:
    """No file may grow beyond `size` bytes: what a full disk does to whoever writes (EFBIG for ENOSPC)."""

    size: int

    def __call__(self) -> None:
        _limit(self.size)
        sys.stdout, sys.stderr = Unlimited(sys.stdout, self.size), Unlimited(sys.stderr, self.size)


class Unlimited:
    """A stream to a file that may grow although others may not, so that what a command says of them is heard."""

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
    import resource

    resource.setrlimit(
        resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY if size is None else size, resource.RLIM_INFINITY)
    )


@dataclass(frozen=True)
class Locked:
    """From here on nobody may write in `folder`, nor may root."""

    folder: Path

    def __call__(self) -> None:
        obey_permissions()
        self.folder.chmod(0o500)


def obey_permissions() -> None:
    """From here on, files that forbid it are not written, root or not. OSError where root cannot renounce."""
    if os.geteuid():
        return
    if not sys.platform.startswith("linux"):
        raise OSError("root may write anywhere on this system; start this as another user")
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: bits 0 to 31, then 32 to 63
    if libc.capget(header, sets) == 0:
        for number in (0, 1):
            sets[number] &= ~(1 << CAN_WRITE_ANYWHERE)
        if libc.capset(header, sets) == 0:
            return
    raise OSError(ctypes.get_errno(), "root cannot renounce writing anywhere; start this as another user")


@dataclass(frozen=True)
class FallingClock:
    """time.time() is `step` seconds earlier at every call than at the one before."""

    step: float

    def __call__(self) -> None:
        now = [time.time()]

        def earlier() -> float:
            now[0] -= self.step
            return now[0]

        time.time = earlier
        time.time_ns = lambda: int(earlier() * 1e9)
