"""The validation loss: fixed rows with fixed noise, the same at every step of every run."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from model.forward_process import StepNoise
from model.objective import Objective
from scripts.engine.runtime import RuntimeConfig, host_ready, move
from scripts.engine.training.distributed import Replica, World
from scripts.engine.training.loader import Ahead, Rows, in_order
from scripts.engine.training.metrics import Meter

SEED, STEP = 0, -1  # of the noise


class Validation:
    """Up to `most` rows, `batch_size` at a time over all processes; seq_len: of the training rows."""

    def __init__(
        self,
        replica: Replica,
        objective: Objective,
        rows: Rows,
        most: int,
        batch_size: int,
        seq_len: int,
        runtime: RuntimeConfig,
        world: World,
    ):
        self.replica, self.model, self.objective = replica, replica.model, objective.for_validation()
        self.rows, self.most, self.batch_size, self.seq_len = rows, most, batch_size, seq_len
        self.runtime, self.device, self.world = runtime, runtime.torch_device, world

    @torch.no_grad()
    def __call__(self, between: Callable[[], None]) -> tuple[Tensor, Tensor, Meter]:
        """Nats and counts of every row, (R,) float64 on the host; what else the objective averages, on the first
        process. between() is called before every batch, and may raise."""
        meter, measured = Meter(), []
        self.model.eval()
        try:
            with Ahead(self._batches(), between=between if self.world.size == 1 else None) as ready:
                for first, own, prepared in ready:
                    between()
                    with self.runtime.autocast():
                        loss = self.replica.loss(self.objective, move(prepared, self.device))
                    if own:
                        measured.append((slice(first, first + own), loss))
                        for name, (total, number) in loss.averages.items():
                            meter.add(name, total, number)
        finally:
            self.model.train()
            self.replica.rest()
        rows = torch.zeros(2, self.most, dtype=torch.float64)
        for mine, loss in measured:
            rows[0, mine], rows[1, mine] = loss.nats.cpu(), loss.count.cpu()
        nats, counts = self.world.total(rows)
        return nats, counts, meter.gathered(self.world)

    def _batches(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """in_order's, prepared."""
        for first, own, batch in in_order(self.rows, self.batch_size, self.most, self.world.rank, self.world.size):
            noise = StepNoise(SEED, STEP, self.most, first, self.seq_len, 0.0)
            yield first, own, host_ready(self.objective.prepare(batch, self.model.config, noise), self.device)
