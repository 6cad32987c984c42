"""Which rows a step sees: a function of (seed, step), so that resuming is a matter of counting."""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Rows(Protocol):
    """What a stage trains on: rows that can be fetched by number as a batch of (B, L) tensors on the host."""

    seq_len: int  # the widest row
    real_token_share: float  # of all positions, those that are not padding

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]: ...


class RowOrder:
    """An endless sequence of row numbers: one permutation of all rows after another, each from (seed, epoch)."""

    def __init__(self, num_rows: int, seed: int):
        self.num_rows, self.seed = num_rows, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __call__(self, start: int, count: int) -> np.ndarray:
        """Entries start .. start + count of the sequence, (count,) int64."""
        places = np.arange(start, start + count)
        rows = np.empty(count, dtype=np.int64)
        for epoch in np.unique(places // self.num_rows):
            here = places // self.num_rows == epoch
            rows[here] = self._order(int(epoch))[places[here] % self.num_rows]
        return rows

    def _order(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        return self._permutation


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Move a batch from the host, without `document_ids` where every row is one document and full: no mask is needed
    then."""
    if "document_ids" in batch and not batch["document_ids"].any():
        batch = {name: tensor for name, tensor in batch.items() if name != "document_ids"}
    if device.type == "cuda":  # pinned memory lets the copy overlap with the step before
        return {name: tensor.pin_memory().to(device, non_blocking=True) for name, tensor in batch.items()}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def in_order(rows: Rows, batch_size: int, max_rows: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(number of the first row, batch) over `max_rows` rows spread evenly, always the same ones."""
    count = min(len(rows), max_rows)
    chosen = np.linspace(0, len(rows) - 1, count).round().astype(np.int64) if count else np.empty(0, dtype=np.int64)
    for first in range(0, count, batch_size):
        yield first, rows.batch(chosen[first : first + batch_size])
