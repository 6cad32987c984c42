"""Rows as the training loop asks for them, and their way to the device."""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor


class Rows(Protocol):
    """What a stage trains on: rows that can be fetched by number as a batch of (B, L) tensors on the host."""

    seq_len: int  # the widest row
    real_token_share: float  # of all positions, those that are not padding

    def __len__(self) -> int: ...

    def order(self, seed: int, rows_per_step: int) -> Callable[[int, int], np.ndarray]:
        """(start, count) -> that stretch of the endless sequence in which a run with this seed asks for rows."""

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]: ...


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Move the tensors of a batch from the host, also those in lists and dicts, without `document_ids` where every row
    is one document and full: no mask is needed then."""
    if "document_ids" in batch and not batch["document_ids"].any():
        batch = {name: value for name, value in batch.items() if name != "document_ids"}
    return {name: _moved(value, device) for name, value in batch.items()}


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_moved(item, device) for item in value]
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    if not isinstance(value, Tensor):
        return value
    if device.type == "cuda":  # pinned memory lets the copy overlap with the step before
        return value.pin_memory().to(device, non_blocking=True)
    return value.to(device)


def in_order(rows: Rows, batch_size: int, max_rows: int) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(number of the first row, batch) over `max_rows` rows spread evenly, always the same ones."""
    count = min(len(rows), max_rows)
    chosen = np.linspace(0, len(rows) - 1, count).round().astype(np.int64) if count else np.empty(0, dtype=np.int64)
    for first in range(0, count, batch_size):
        yield first, rows.batch(chosen[first : first + batch_size])
