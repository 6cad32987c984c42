"""The most memory that some work takes, in a process of its own."""

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

STATUS = Path("/proc/self/status")
SAMPLED_EVERY = 0.005  # seconds between two looks at the memory that the system keeps no peak of


class Peak(NamedTuple):
    """The most bytes that a process has held."""

    resident: int  # with the pages of mapped files, which the system takes back when it needs them
    private: int | None  # for itself alone; None if the system does not report it


def in_own_process(work: Callable[..., Any], *args: Any) -> tuple[Any, Peak]:
    """work(*args), which must be picklable, in a new process, whose memory nothing else has used."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(watched, work, *args).result()


def watched(work: Callable[..., Any], *args: Any) -> tuple[Any, Peak]:
    """work(*args), while a thread watches the private memory."""
    ended = threading.Event()

    def most_private() -> int | None:
        most = _status("RssAnon")
        done = most is None
        while not done:
            done = ended.wait(SAMPLED_EVERY)
            most = max(most, _status("RssAnon"))
        return most

    with ThreadPoolExecutor(1) as pool:
        private = pool.submit(most_private)
        try:
            result = work(*args)
        finally:
            ended.set()
    return result, Peak(most_resident(), private.result())


def most_resident() -> int:
    """Bytes of memory that this process has had at most."""
    if sys.platform == "linux":  # where ru_maxrss begins with the parent's
        return _status("VmHWM")
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(name: str) -> int | None:
    """A field of /proc/self/status in bytes; None if there is none."""
    lines = STATUS.read_text(encoding="ascii").splitlines() if STATUS.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":")), None)
