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

from scripts.engine import runtime
from scripts.engine.runtime import attempt, launched, num_processes, store

PATIENCE = timedelta(days=1)  # for a process that reads a corpus while the others wait


@dataclass(frozen=True)
class World:
    """The processes of a training, numbered by `rank`. All of them take the same steps and learn the same weights; the
    first alone prints and writes."""

    rank: int = 0
    size: int = 1
    control: Any = None  # for what hosts tell each other, beside the devices' gradients

    @staticmethod
    @contextmanager
    def opened(device: torch.device) -> Iterator["World"]:
        """The world of the processes that torchrun has started, each on its `device`; else that of this one alone.

        Where an error ends one process, the others end with it, in silence. Where one is killed, ConnectionError.
        """
        if not launched():
            yield ALONE
            return
        rank, size = int(os.environ["RANK"]), num_processes()
        control = _meet(rank, size, device)
        try:
            yield World(rank, size, control)
        except SystemExit:  # agreed upon
            dist.destroy_process_group()
            raise
        except BaseException as error:
            if isinstance(error, RuntimeError) and _another_failed():  # it left us in the middle of a sum
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
        """This process's part of the `count` rows from `first` on."""
        own = count // self.size
        return slice(first + self.rank * own, first + (self.rank + 1) * own)

    def most(self, number: int) -> int:
        """The largest of the numbers that the processes give."""
        if self.control is None:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.control)
        return int(found)

    def total(self, values: Tensor) -> Tensor:
        """The sum, over the processes, of a tensor on the host."""
        if self.control is not None:
            dist.all_reduce(values, group=self.control)
        return values

    def add(self, values: Tensor) -> Tensor:
        """The sum, over the processes, of a tensor on the device; the host does not wait."""
        if self.control is not None:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """What the processes give, on the first one; nothing on the others."""
        if self.control is None:
            return [value]
        found = [None] * self.size if self.is_main else None
        dist.gather_object(value, found, dst=0, group=self.control)
        return found or []

    def main_first(self, action: Callable[[], Any]) -> Any:
        """action() on the first process, and then on the others, which find made what the first one has made."""
        result = action() if self.is_main else None
        self.most(0)
        return result if self.is_main else action()


ALONE = World()


def _another_failed() -> bool:
    try:
        return store().check([attempt("failed")])
    except RuntimeError:  # it kept the store
        return True


def _meet(rank: int, size: int, device: torch.device) -> Any:
    """Open the process group; the group for what hosts tell each other. ConnectionError where not all arrive."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend, more = ("nccl", {"device_id": device}) if device.type == "cuda" else ("gloo", {"timeout": runtime.MEETING})
    try:
        dist.init_process_group(backend, store=store(), rank=rank, world_size=size, **more)
        control = dist.new_group(backend="gloo", timeout=runtime.MEETING)
    except RuntimeError as error:
        if not _lost_another(error):
            raise
        raise ConnectionError(
            f"the {size} processes of this training have not all arrived within {runtime.MEETING.seconds} seconds"
            f"{_detail(error)}; look at what the others say, and start all again"
        ) from error
    for group in (control, dist.group.WORLD) if backend == "gloo" else (control,):
        _set_pg_timeout(PATIENCE, group)  # torch has no public name for it
    return control


def _detail(error: BaseException) -> str:
    """What a backend says where it knows more than that a connection has gone."""
    return f" ({str(error).strip().splitlines()[0]})" if isinstance(error, dist.DistBackendError) else ""


def _lost_another(error: BaseException) -> bool:
    """Whether this is what a process meets in the middle of a sum to which another one no longer adds."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


class Scoring(nn.Module):
    """A model whose forward pass is an objective's loss. Objectives call the model inside; so that
    DistributedDataParallel sees the whole, it wraps this."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, objective: Any, prepared: Mapping[str, Any]) -> Any:
        return objective.loss(self.model, prepared)


class Replica:
    """The model in training as one process holds it: all of it, a copy like that of every other, or a shard."""

    def __init__(self, model: nn.Module, world: World, device: torch.device, sharded: bool, dtype: torch.dtype):
        """sharded: by FSDP2, with the arithmetic of autocast in `dtype`."""
        self.model, self.sharded = shard(model, device, dtype) if sharded else model.to(device), sharded
        self.scoring = Scoring(self.model)
        self.copies = None
        if world.control is not None and not sharded:
            self.copies = data_parallel(self.scoring)

    def loss(self, objective: Any, prepared: Mapping[str, Any]) -> Any:
        """The objective's RowLoss of this process's rows."""
        if self.sharded:  # an objective may read the embedding before it calls the model
            self.model.unshard()
        return (self.copies if self.copies and torch.is_grad_enabled() else self.scoring)(objective, prepared)

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Within it a backward pass exchanges gradients between the processes only if it is the `last` of the step."""
        if self.sharded:
            self.model.set_requires_gradient_sync(last)
        return self.copies.no_sync() if self.copies and not last else nullcontext()

    def rest(self) -> None:
        """To be called after forward passes without backward, which leave some parameters unsharded."""
        if self.sharded:
            self.model.reshard()


def data_parallel(module: nn.Module) -> nn.Module:
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


def is_sharded(value: Any) -> bool:
    return isinstance(value, Tensor) and hasattr(value, "full_tensor")


def whole(value: Any, keep: bool) -> Any:
    """`value`, a tensor or nested dicts and lists, its shards put together on the host, where it is to be kept, else
    without them; all processes call it."""
    if isinstance(value, dict):
        return {name: whole(item, keep) for name, item in value.items()}
    if isinstance(value, list):
        return [whole(item, keep) for item in value]
    if not is_sharded(value):
        return value
    together = value.full_tensor()
    return together.cpu() if keep else None


def shards_like(values: Mapping[Any, Tensor], own: Mapping[Any, Tensor]) -> dict[Any, Tensor]:
    """`values`, those cut into shards whose namesake in `own` is sharded, and of its shape."""
    from torch.distributed.tensor import distribute_tensor

    made = dict(values)
    for name, value in values.items():
        like = own.get(name)
        if is_sharded(like) and isinstance(value, Tensor) and like.shape == value.shape:
            # Every process has the whole tensor, so nothing is sent.
            made[name] = distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
    return made
