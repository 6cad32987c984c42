"""The state of a training: everything that changes from step to step, and that a checkpoint holds to continue it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import load_weights
from model.transformer import Transformer
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.training.distributed import World, shards_like, whole
from scripts.engine.training.metrics import Meter
from scripts.engine.training.optim import MovingAverage, OptimConfig, load_optimizer, make_optimizers, total_norm


@dataclass
class Progress:
    """The counters of a run."""

    step: int = 0
    last_eval: int = 0  # step of the last validation
    bad_evals: int = 0  # validations in a row that did not improve enough
    best_loss: float = math.inf
    best_step: int = 0
    stop_loss: float = math.inf  # that the next validation has to improve on
    seconds: float = 0.0
    tokens: int = 0  # on the first process all that have been collected


class TrainingState:
    """Model, optimizers, moving average, loss scale, counters and sums of a training."""

    def __init__(self, model: Transformer, optim: OptimConfig, runtime: RuntimeConfig, world: World):
        """model: on its device, and sharded if it is to be."""
        self.model, self.world, self.device = model, world, runtime.torch_device
        self.parameters = list(model.parameters())
        self.optimizers = make_optimizers(model, optim)
        self.average = MovingAverage(model, optim.ema_decay) if optim.ema_decay else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=runtime.torch_dtype == torch.float16)
        self.progress = Progress()
        self.meter = Meter()  # of this process; `collect` brings all sums to the first one

    @property
    def weights_are_finite(self) -> bool:
        return math.isfinite(total_norm([parameter.detach() for parameter in self.parameters]))

    def swap_average(self) -> None:
        """Exchange the weights and their moving average, if there is one."""
        if self.average:
            self.average.swap(self.model)

    def collect(self) -> None:
        """Bring the sums and the tokens of all processes to the first one."""
        self.meter = self.meter.gathered(self.world)
        self.progress.tokens = sum(self.world.gather(self.progress.tokens))

    def weights(self) -> dict[str, Tensor]:
        """Return the whole weights on the first process. All processes call it."""
        return whole(self.model.state_dict(), keep=self.world.is_main)

    def load_weights(self, weights: dict[str, Tensor], source: str) -> None:
        """Load whole weights; raise ValueError, naming `source`, if they do not fit."""
        load_weights(self.model, shards_like(weights, self.model.state_dict()), source)

    def load_moments(self, optimizers: list[dict]) -> None:
        """Load the optimizers' moments of another run; learning rates and decay stay those of this one."""
        for optimizer, saved in zip(self.optimizers, optimizers, strict=False):
            load_optimizer(optimizer, optimizer.state_dict() | {"state": saved["state"]})

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, on the first process. All processes call it."""
        average = {"shadow": self.average.shadow, "updates": self.average.updates} if self.average else None
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        keep = self.world.is_main
        return {
            "weights": self.weights(),
            "optimizers": whole(optimizers, keep),
            "average": whole(average, keep),
            "meter": self.meter.sums,
            "scaler": self.scaler.state_dict(),
            **asdict(self.progress),
        }

    def load_state_dict(self, saved: dict[str, Any], source: str) -> None:
        """Continue from what `state_dict` has returned; every process reads the same."""
        self.load_weights(saved["weights"], source)
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            load_optimizer(optimizer, state)
        if self.scaler.is_enabled() and saved["scaler"]:
            self.scaler.load_state_dict(saved["scaler"])
        if self.average:
            shadow = shards_like(saved["average"]["shadow"], self.average.shadow)
            self.average.shadow = {name: tensor.to(self.device) for name, tensor in shadow.items()}
            self.average.updates = saved["average"]["updates"]
        self.progress = Progress(**{name: saved[name] for name in asdict(self.progress)})
        if self.world.is_main:
            sums = saved["meter"].items()
            self.meter = Meter({name: (total.to(self.device), n.to(self.device)) for name, (total, n) in sums})
        else:  # the first process has counted them
            self.progress.tokens = 0
