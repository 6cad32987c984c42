"""The validation loss: fixed rows with fixed noise, the same at every step of every run."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from model.forward_process import StepNoise
from model.objective import Objective
from scripts.engine.runtime import host_ready, move
from scripts.engine.training.config import StageConfigs
from scripts.engine.training.distributed import Replica, World
from scripts.engine.training.loader import Ahead, Dataset, in_order
from scripts.engine.training.metrics import Meter

SEED, STEP = 0, -1  # of the noise


class Validation:
    """Measures the loss of up to --eval-max-batches batches, shared out among the processes."""

    def __init__(self, replica: Replica, objective: Objective, dataset: Dataset, configs: StageConfigs, world: World):
        self.replica, self.model, self.objective = replica, replica.model, objective.for_validation()
        self.rows, self.width = dataset.validation, dataset.train.seq_len
        self.batch_size = configs.trainer.batch_size
        self.num_rows = min(len(self.rows), configs.run.eval_max_batches * self.batch_size)
        self.runtime, self.device, self.world = configs.runtime, configs.runtime.torch_device, world

    @torch.no_grad()
    def __call__(self, between: Callable[[], None]) -> tuple[Tensor, Tensor, Meter]:
        """Return nats and counts of every row, (R,) float64 on the host, and on the first process the objective's other
        averages. between() is called before every batch, and may raise."""
        meter, losses = Meter(), []
        self.model.eval()
        try:
            with Ahead(self._batches(), between=between if self.world.size == 1 else None) as ready:
                for first, count, prepared in ready:
                    between()
                    with self.runtime.autocast():
                        loss = self.replica.loss(self.objective, move(prepared, self.device))
                    if count:
                        losses.append((slice(first, first + count), loss))
                        for name, (total, number) in loss.averages.items():
                            meter.add(name, total, number)
        finally:
            self.model.train()
            self.replica.rest()
        rows = torch.zeros(2, self.num_rows, dtype=torch.float64)
        for own, loss in losses:
            rows[0, own], rows[1, own] = loss.nats.cpu(), loss.count.cpu()
        nats, counts = self.world.total(rows)
        return nats, counts, meter.gathered(self.world)

    def _batches(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """Yield what `in_order` does, prepared."""
        rank, size = self.world.rank, self.world.size
        for first, count, batch in in_order(self.rows, self.batch_size, self.num_rows, rank, size):
            noise = StepNoise(SEED, STEP, self.num_rows, first, self.width, 0.0)
            yield first, count, host_ready(self.objective.prepare(batch, self.model.config, noise), self.device)
