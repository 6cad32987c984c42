"""Several processes that train one model: who they are, what they agree upon, how they share its weights.

torchrun starts the processes and tells each its place in environment variables. Without it there is one process, and
nothing of torch.distributed is touched.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.utils._pytree import tree_map

from model.objective import Objective, RowLoss
from scripts.engine import runtime
from scripts.engine.runtime import attempt, launched, num_processes, store

PATIENCE = timedelta(days=1)  # for a process that reads a corpus while the others wait


@dataclass(frozen=True)
class World:
    """The processes of a training, numbered by `rank`. All of them take the same steps and learn the same weights; the
    first alone prints and writes."""

    rank: int = 0
    size: int = 1
    control: Any = None  # group for what hosts tell each other, beside the devices' gradients

    @staticmethod
    @contextmanager
    def opened(device: torch.device) -> Iterator["World"]:
        """Open the world of the processes that torchrun has started, each on its `device`, or that of this one alone.

        An error of one process ends the others in silence. After one is killed, the others raise ConnectionError.
        """
        if not launched():
            yield ALONE
            return
        rank, size = int(os.environ["RANK"]), num_processes()
        control = _join(rank, size, device)
        try:
            yield World(rank, size, control)
        except SystemExit:  # agreed upon
            dist.destroy_process_group()
            raise
        except BaseException as error:
            if isinstance(error, RuntimeError) and _another_failed():  # it left in the middle of an all-reduce
                raise SystemExit(1) from error
            with suppress(RuntimeError):
                store().set(attempt("failed"), str(rank))
            if _lost_another(error):
                raise ConnectionError(
                    "another process of this training has ended without saying why: killed, maybe for want of memory, "
                    f"or cut off from the network{_detail(error)}; go on with the same command and --resume auto"
                ) from error
            raise
        dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, first: int, count: int) -> slice:
        """Return this process's part of the `count` rows from `first` on."""
        own = count // self.size
        return slice(first + self.rank * own, first + (self.rank + 1) * own)

    def barrier(self) -> None:
        """Wait until all processes have come here."""
        self.most(0)

    def most(self, number: int) -> int:
        """Return the largest of the processes' numbers."""
        if self.control is None:
            return number
        largest = torch.tensor(number)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def total(self, values: Tensor) -> Tensor:
        """Return the sum, over the processes, of a tensor on the host."""
        if self.control is not None:
            dist.all_reduce(values, group=self.control)
        return values

    def add(self, values: Tensor) -> Tensor:
        """Return the sum, over the processes, of a tensor on the device; the host does not wait."""
        if self.control is not None:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Return the processes' values on the first one, and nothing on the others."""
        if self.control is None:
            return [value]
        values = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, dst=0, group=self.control)
        return values or []

    def main_first(self, action: Callable[[], Any]) -> Any:
        """Call action() on the first process, and then on the others, which find the files that it has made."""
        result = action() if self.is_main else None
        self.barrier()
        return result if self.is_main else action()


ALONE = World()


def _join(rank: int, size: int, device: torch.device) -> Any:
    """Open the process group of the devices; return that of the hosts. ConnectionError if not all processes arrive."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        options = {"backend": "nccl", "device_id": device}
    else:
        options = {"backend": "gloo", "timeout": runtime.MEETING}
    try:
        dist.init_process_group(store=store(), rank=rank, world_size=size, **options)
        control = dist.new_group(backend="gloo", timeout=runtime.MEETING)
    except RuntimeError as error:
        if not _lost_another(error):
            raise
        raise ConnectionError(
            f"the {size} processes of this training have not all arrived within {runtime.MEETING.seconds} seconds"
            f"{_detail(error)}; look at what the others say, and start all again"
        ) from error
    for group in (control, dist.group.WORLD) if options["backend"] == "gloo" else (control,):
        _set_pg_timeout(PATIENCE, group)  # torch has no public name for it
    return control


def _another_failed() -> bool:
    try:
        return store().check([attempt("failed")])
    except RuntimeError:  # it kept the store
        return True


def _lost_another(error: BaseException) -> bool:
    """Return whether this is how an all-reduce ends after another process has ended."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _detail(error: BaseException) -> str:
    """Return what a backend says if it knows more than that a connection has gone."""
    return f" ({str(error).strip().splitlines()[0]})" if isinstance(error, dist.DistBackendError) else ""


class Scoring(nn.Module):
    """A model whose forward pass is an objective's loss. Objectives call the model inside; so that
    DistributedDataParallel sees the whole, it wraps this."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, objective: Objective, prepared: Mapping[str, Any]) -> RowLoss:
        return objective.loss(self.model, prepared)


class Replica:
    """The model in training as one process holds it: all of it, a copy like that of every other, or a shard."""

    def __init__(self, model: nn.Module, world: World, device: torch.device, sharded: bool, dtype: torch.dtype):
        """sharded: by FSDP2, with the arithmetic of autocast in `dtype`."""
        self.model, self.sharded = shard(model, device, dtype) if sharded else model.to(device), sharded
        self.scoring = Scoring(self.model)
        self.copies = data_parallel(self.scoring) if world.control is not None and not sharded else None

    def loss(self, objective: Objective, prepared: Mapping[str, Any]) -> RowLoss:
        """Return the loss of this process's rows."""
        if self.sharded:  # an objective may read the embedding before it calls the model
            self.model.unshard()
        return (self.copies if self.copies and torch.is_grad_enabled() else self.scoring)(objective, prepared)

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Have backward passes inside exchange gradients between the processes only if `last` of the step."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
        return self.copies.no_sync() if self.copies and not last else nullcontext()

    def rest(self) -> None:
        """Shard again after forward passes without backward, which leave some parameters whole."""
        if self.sharded:
            self.model.reshard()


def data_parallel(module: nn.Module) -> nn.Module:
    """Wrap a module so that backward passes average its gradients over the processes."""
    wrap = nn.parallel.DistributedDataParallel
    # The model's buffers are constants. The first name is that of torch 2.13 and later.
    names = ("forward_sync_buffers", "broadcast_buffers")
    constant = next(name for name in names if name in inspect.signature(wrap).parameters)
    return wrap(module, gradient_as_bucket_view=True, **{constant: False})


def shard(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Shard a Transformer with FSDP2, a layer at a time, onto `device`.

    Its arithmetic stays that of autocast in `dtype`: the matrices of the layers are gathered in it, to which autocast
    would cast them; norms, embedding and head are gathered, and all gradients summed, in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    matrices = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.layers:
        if dtype != torch.float32:
            fully_shard([module for module in layer.modules() if isinstance(module, nn.RMSNorm)], mesh=mesh)
        fully_shard(layer, mesh=mesh, mp_policy=matrices if dtype != torch.float32 else MixedPrecisionPolicy())
    return fully_shard(model, mesh=mesh, reshard_after_forward=False).to(device)


# torch.distributed.checkpoint.state_dict would do both, but names optimizer states by parameter, not by number as our
# files do, and takes a step of every optimizer that has not taken one.


def is_sharded(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def whole(tree: Any, keep: bool) -> Any:
    """Return nested dicts and lists with the shards in them put together on the host, or dropped unless they are to be
    kept. All processes call it."""

    def gathered(value: Any) -> Any:
        if not is_sharded(value):
            return value
        together = value.full_tensor()
        return together.cpu() if keep else None

    return tree_map(gathered, tree)


def shards_like(values: Mapping[Any, Tensor], own: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """Return `values`, cut into shards where the value of the same name in `own` is sharded and has their shape."""
    from torch.distributed.tensor import distribute_tensor

    shards = dict(values)
    for name, value in values.items():
        like = own.get(name)
        if is_sharded(like) and isinstance(value, Tensor) and like.shape == value.shape:
            # Every process has the whole tensor, so nothing is sent.
            shards[name] = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return shards
