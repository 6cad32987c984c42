"""The host's memory: what the allocator does with what is freed, and how much a process has used at most."""

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

# glibc's malloc.h. Setting any of them ends the allocator's own adjustment, so the usual values are those that it comes
# to in a training; under the others it gives nothing back before the process ends.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
USUAL = {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26, M_TOP_PAD: 2**17, M_MMAP_MAX: 2**16}
KEPT = {M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26, M_MMAP_MAX: 0}


def keep_freed_memory(keep: bool = True) -> bool:
    """Have malloc keep what is freed for the next request; returns whether it could be told (glibc can).

    A training step frees and asks for the same hundreds of megabytes again and again. Given back to the system in
    between, every page of them is a fault, which on a virtual machine costs more than computing on it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(option, value) == 1 for option, value in (KEPT if keep else USUAL).items())


def most_resident() -> int:
    """Bytes of memory that this process has had at most. Not ru_maxrss, which on Linux begins with the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        raise ValueError("this system does not tell how much memory a process has used") from None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_of(work: Callable[..., Any], device: torch.device, *args: Any) -> int:
    """Bytes that work(*args) takes at most beside what a process has anyway; it is run in a process of its own. work
    and args must be picklable."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak, work, device, args).result()


def _peak(work: Callable[..., Any], device: torch.device, args: tuple) -> int:
    torch.ones(8, 8, requires_grad=True).square().sum().backward()  # what the first use loads is no part of it
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
        work(*args)
        return torch.cuda.max_memory_allocated(device)
    before = most_resident()
    work(*args)
    return most_resident() - before
