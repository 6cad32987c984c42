"""How a command computes, not what: processes, device, precision and seed, provenance of results, memory."""

import ctypes
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy
import tokenizers
import torch
import torch.distributed as dist
import transformers
from torch import Tensor

MEETING = timedelta(minutes=5)  # for all processes to arrive
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = "model", "dataset", "scripts"  # whose code makes the numbers


def launched() -> bool:
    """Return whether torchrun, or a compatible launcher, has started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def num_processes() -> int:
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def local_rank() -> int:
    """Return this process's number among those of its machine, which is also that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0)) if launched() else 0


@cache
def store() -> Any:
    """Return the key-value store by which the processes of a run find each other."""
    return next(dist.rendezvous("env://", timeout=MEETING))[0]


def attempt(key: str) -> str:
    """Return the key for this start of the processes: torchrun may start all again, with the same store."""
    return f"{key}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def first_to_say(sentence: str) -> bool:
    """Return whether no other process of this run has said it: a mistake that all of them notice is reported once."""
    if not launched():
        return True
    digest = hashlib.sha256(sentence.encode()).hexdigest()
    try:
        return store().add(attempt(f"said/{digest}"), 1) == 1
    except RuntimeError:  # the process that keeps the store has gone; it speaks for all
        return os.environ["RANK"] == "0"


@dataclass(frozen=True)
class RuntimeConfig:
    """Device, precision, seed."""

    device: Annotated[str, "torch device; auto = the first GPU if there is one, else the CPU"] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"],
        "precision of matrix products; auto = bfloat16 on CUDA and on CPUs with bfloat16 units",
    ] = "auto"
    seed: Annotated[int, "seed of initial weights, order, noise and sampling", "in [0, 2^32)"] = 1337

    def __post_init__(self):
        try:
            device = self.torch_device
        except RuntimeError:
            raise ValueError(
                f"--device {self.device!r} is not a torch device; examples: auto, cpu, cuda, cuda:1, mps"
            ) from None
        if device.type not in ("cpu", "cuda", "mps"):
            raise ValueError(f"--device {self.device} is not supported; use auto, cpu, cuda or mps")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {self.device} was asked for, but this machine or this torch build has no CUDA")
        if device.type == "mps" and not torch.backends.mps.is_available():
            raise ValueError("--device mps was asked for, but this machine has no Metal GPU that torch can use")
        if num_processes() > 1:
            self._require_own_device(device)
        if self.dtype == "float16" and device.type == "cpu":
            raise ValueError("--dtype float16 needs a GPU; use bfloat16 or float32 on a CPU")

    def _require_own_device(self, device: torch.device) -> None:
        if device.type == "mps":
            raise ValueError("--device mps trains in one process; start the command without torchrun")
        if ":" in self.device:
            raise ValueError(f"--device {self.device} is one for all processes; give --device {device.type}")
        if device.type == "cuda" and device.index >= torch.cuda.device_count():
            raise ValueError(
                f"there are more processes than the {torch.cuda.device_count()} GPUs of this machine; "
                "give torchrun a smaller --nproc-per-node"
            )

    @property
    def torch_device(self) -> torch.device:
        if self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available()):
            return torch.device("cuda", local_rank()) if launched() else torch.device("cuda")
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")

    @property
    def torch_dtype(self) -> torch.dtype:
        if self.dtype != "auto":
            return getattr(torch, self.dtype)
        device = self.torch_device.type
        fast = (
            torch.cuda.is_bf16_supported(including_emulation=False)
            if device == "cuda"
            else device == "cpu" and _cpu_has_bfloat16_units()
        )
        return torch.bfloat16 if fast else torch.float32

    @property
    def dtype_name(self) -> str:
        return str(self.torch_dtype).removeprefix("torch.")

    def autocast(self) -> AbstractContextManager:
        if self.torch_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.torch_device.type, dtype=self.torch_dtype)

    def describe(self) -> str:
        name = (
            torch.cuda.get_device_name(self.torch_device)
            if self.torch_device.type == "cuda"
            else f"{torch.get_num_threads()} threads"
        )
        processes = f", {num_processes()} processes" if num_processes() > 1 else ""
        return f"{self.torch_device} ({name}), {self.dtype_name}{processes}"


def _cpu_has_bfloat16_units() -> bool:
    """Return whether the CPU has units for bfloat16 matrix products (AVX512-BF16, AMX, Arm BF16)."""
    if not hasattr(torch.cpu, "get_capabilities"):  # older than torch 2.12
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def provenance(runtime: RuntimeConfig) -> dict[str, Any]:
    """Return what a result depends on beside its settings, for every log and result file.

    The same command, code, versions, device and number of processes give the same numbers to the last digit, except
    seconds. Another device or version, and a batch of another shape, sum in another order. float32 logits then differ
    by 5e-7 of their size (median; at most 1e-5), which changed none of 3,000 texts; bfloat16 differs from float32 by up
    to 2e-2, which changes a good part of all texts.
    """
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "numpy": numpy.__version__,
        "device": runtime.describe(),
        "processor": _processor(),
        "dtype": runtime.dtype_name,
        "seed": runtime.seed,
    }


def command_line(module: str, argv: list[str] | None) -> str:
    """Return the command as it is typed; argv: what its `main` was given."""
    return shlex.join(["uv", "run", "python", "-m", module, *map(str, sys.argv[1:] if argv is None else argv)])


def _processor() -> str:
    """Return the processor's model, or its architecture if the system says no more."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _commit(root: Path = ROOT) -> str:
    """Return the commit of the running code, with "+" if tracked files differ from it or its packages hold untracked
    modules; "unknown" if `root` is not the root of a git checkout."""

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if not Path(git("rev-parse", "--show-toplevel")).samefile(root):
            return "unknown"
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "-uno")
        modules = [f"{package}/*.py" for package in PACKAGES]
        return commit + ("+" if changed or git("ls-files", "--others", "--exclude-standard", *modules) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch from the host, also those in lists and dicts. `document_ids` is dropped if every row
    is one full document, which needs no mask."""
    return move(host_ready(batch, device), device)


def host_ready(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Do the host's part of `to_device`, which a thread may do."""
    if "document_ids" in batch and not batch["document_ids"].any():
        batch = {name: value for name, value in batch.items() if name != "document_ids"}
    # Pinned memory lets the copy overlap with the step before.
    return _each(batch, Tensor.pin_memory) if device.type == "cuda" else batch


def move(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Do the device's part of `to_device`; for pinned tensors the host does not wait."""
    return _each(batch, lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, list):
        return [_each(item, change) for item in value]
    if isinstance(value, dict):
        return {name: _each(item, change) for name, item in value.items()}
    return change(value) if isinstance(value, Tensor) else value


# Large pages for CPU tensors, where Linux grants them on request: fewer page faults, and up to a third more training
# tokens per second on one core (AR, 6.5M parameters, --compile); no number changes. Read when torch first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# glibc's malloc.h. Setting any of them ends the allocator's own adjustment, so the usual values are those that it comes
# to in a training; under the others it gives nothing back before the process ends.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4
USUAL = {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**26, M_TOP_PAD: 2**17, M_MMAP_MAX: 2**16}
KEPT = {M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26, M_MMAP_MAX: 0}


def keep_freed_memory(keep: bool = True) -> bool:
    """Have malloc keep freed memory for the next request; return whether it can (glibc's can).

    A training step frees and requests the same hundreds of megabytes again and again. If they went back to the system
    in between, every page would be a fault, which on a virtual machine costs more than computing on it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all(mallopt(option, value) == 1 for option, value in (KEPT if keep else USUAL).items())
