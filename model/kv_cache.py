"""Key/value caches: of a prefix that grows at its end, and of columns that are written anywhere.

Shapes: B rows, H_kv key/value heads, D head size, L positions of the current pass, C columns of a cache.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from model.config import ModelConfig


class Cache(Protocol):
    """Keys and values from outside the current pass, as Transformer uses them.

    Each layer hands over the keys and values of the current tokens and attends to what comes back.
    """

    length: int  # positions before the current tokens: without position_ids, these count up from here
    max_length: int  # longest sequence that the cache serves, in tokens

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take keys and values (B, H_kv, L, D) of this pass; return all that its queries attend to, in the order of
        the attention mask's key columns, each (B, H_kv, L_key, D)."""


class _Storage:
    """Keys and values of every layer, each (B, H_kv, C, D) and contiguous.

    They are allocated by the first write, because autocast decides the dtype of keys and values.
    """

    def __init__(self, config: ModelConfig, num_rows: int, num_columns: int):
        self.shape = num_rows, config.num_key_value_heads, num_columns, config.head_dim
        self.num_layers = config.num_hidden_layers
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def keep(self, rows: Tensor) -> None:
        """Forget all rows except these (R,), which become rows 0 to R - 1."""
        self.shape = len(rows), *self.shape[1:]
        self.keys = [key.index_select(0, rows) for key in self.keys]
        self.values = [value.index_select(0, rows) for value in self.values]

    def allocate(self, like: Tensor) -> None:
        """Make room at the first write, with the device and dtype of `like`."""
        # Zeros, not empty memory: a masked column has weight 0, and 0 times a NaN is a NaN.
        if not self.keys:
            self.keys = [like.new_zeros(self.shape) for _ in range(self.num_layers)]
            self.values = [like.new_zeros(self.shape) for _ in range(self.num_layers)]


class KVCache(_Storage):
    """Keys and values of a prefix of B rows, preallocated for `max_length` columns.

    `update` writes the current tokens after the prefix and returns prefix + current; calling it again overwrites the
    same columns. Only `advance` makes them part of the prefix, so a block can be denoised for many steps against one
    cache.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int):
        super().__init__(config, batch_size, max_length)
        self.max_length, self.length = max_length, 0

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value (B, H_kv, L, D) -> both (B, H_kv, length + L, D). ValueError past max_length."""
        size = key.shape[2]
        end = self.length + size
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} positions, {end} were requested")
        self.allocate(key)
        keys, values = self.keys[layer], self.values[layer]
        keys.narrow(2, self.length, size).copy_(key)
        values.narrow(2, self.length, size).copy_(value)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def advance(self, num_positions: int) -> None:
        """Make the tokens of the last pass part of the prefix."""
        self.length += num_positions


class ColumnCache(_Storage):
    """Keys and values of every column of B rows, for rows that are at different places of their texts.

    `view` is the Cache of one pass. Which columns hold something worth attending to, the caller knows and says by the
    attention mask. Past the last column there is a scratch column: rows that feed fewer tokens than the widest write
    their padding there.
    """

    def __init__(self, config: ModelConfig, batch_size: int, num_columns: int):
        super().__init__(config, batch_size, num_columns + 1)
        self.scratch_column = num_columns

    def view(self, rows: Tensor | None, columns: Tensor | slice, stop: int) -> "ColumnView":
        """The cache for a pass that feeds `columns` (R, W) of `rows` (R,) int64 and attends to columns before `stop`.

        rows: None = all rows. columns: a slice if all rows feed the same ones; rows are all of them then.
        """
        if isinstance(columns, Tensor):
            everyone = torch.arange(len(columns), device=columns.device) if rows is None else rows
            columns = self._vectors(everyone, columns)
        return ColumnView(self, rows, columns, stop, self.scratch_column)

    def _vectors(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Places (R * H_kv * W,) of columns (R, W) of rows (R,) among all vectors of a layer.

        A layer (B, H_kv, C, D) is B * H_kv * C vectors of D numbers, one after another. With H_kv = 2 and C = 4:

            row             0                  1
            head            0        1         0          1
            column          0 1 2 3  0 1 2 3   0 1  2  3  0  1  2  3
            place           0 1 2 3  4 5 6 7   8 9 10 11 12 13 14 15    = (row * H_kv + head) * C + column

        Columns 1 and 3 of row 1 are at the places 9, 11 (head 0) and 13, 15 (head 1).
        """
        _, num_heads, num_columns, _ = self.shape
        heads = rows[:, None] * num_heads + torch.arange(num_heads, device=columns.device)  # (R, H_kv)
        return (heads[:, :, None] * num_columns + columns[:, None]).flatten()  # (R, H_kv, W), flat


@dataclass(frozen=True)
class ColumnView:
    """A ColumnCache during one pass: a Cache that writes the columns fed and returns all columns before `stop`."""

    storage: ColumnCache
    rows: Tensor | None  # (R,) int64, None = all
    target: Tensor | slice  # where the keys and values go: places among the vectors of a layer, or columns of all rows
    stop: int
    max_length: int
    length: int = 0  # the caller gives every position

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value (R, H_kv, W, D) -> both (R, H_kv, stop, D)."""
        self.storage.allocate(key)
        return self._write(self.storage.keys[layer], key), self._write(self.storage.values[layer], value)

    def _write(self, stored: Tensor, new: Tensor) -> Tensor:
        if isinstance(self.target, slice):
            stored.narrow(2, self.target.start, new.shape[2]).copy_(new)
        else:
            stored.view(-1, stored.shape[-1]).index_copy_(0, self.target, new.reshape(-1, new.shape[-1]))
        # (B, H_kv, C, D) -> (R, H_kv, stop, D); no copy if all rows take part.
        selected = stored if self.rows is None else stored.index_select(0, self.rows)
        return selected.narrow(2, 0, self.stop)
