"""The most memory that some work takes, in a process of its own."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")
SAMPLED_EVERY = 0.005  # seconds between two looks at the memory that the system keeps no peak of


def in_own_process(work: Callable[..., Any], *args: Any) -> Any:
    """work(*args), which must be picklable, in a new process, whose memory nothing else has used."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def peak_of(work: Callable[..., Any], device: torch.device, *args: Any) -> int:
    """Bytes that work(*args) takes at most beyond those that any process takes; run in a process of its own."""
    return in_own_process(_peak, work, device, args)


def _peak(work: Callable[..., Any], device: torch.device, args: tuple) -> int:
    torch.ones(8, 8, requires_grad=True).square().sum().backward()  # the first use loads libraries
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
        work(*args)
        return torch.cuda.max_memory_allocated(device)
    before = most_resident()
    work(*args)
    return most_resident() - before


def most_resident() -> int:
    """Bytes of memory that this process has had at most. Not ru_maxrss, which on Linux begins with the parent's."""
    if (peak := _status("VmHWM")) is not None:
        return peak
    try:
        import resource
    except ImportError:  # Windows
        raise ValueError("this system does not tell how much memory a process has used") from None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class PrivatePeak:
    """The most memory that the process has held for itself alone, without the pages of mapped files, inside a `with`
    statement; None if the system does not tell."""

    def __enter__(self) -> "PrivatePeak":
        self.bytes = _status("RssAnon")
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while self.bytes is not None and not self._ended.wait(SAMPLED_EVERY):
            self.bytes = max(self.bytes, _status("RssAnon"))


def _status(name: str) -> int | None:
    """A field of /proc/self/status in bytes; None if there is none."""
    if not STATUS.exists():
        return None
    values = [
        line.split()[1] for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(name + ":")
    ]
    return int(values[0]) * 1024 if values else None
