"""Key/value caches: of a committed prefix that grows at its end, and of columns that are written anywhere."""

import torch
from torch import Tensor

from model.config import ModelConfig


class KVCache:
    """Keys and values of the committed prefix, preallocated as (layer, B, H_kv, max_length, D) at the first write.

    `update` writes the current tokens after the prefix and returns prefix + current; calling it again overwrites the
    same slots. Only `advance` makes them part of the prefix, so a block can be denoised for many steps against one
    cache.
    """

    def __init__(self, config: ModelConfig, batch_size: int, max_length: int):
        self.shape = (config.num_hidden_layers, batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.max_length, self.length = max_length, 0
        self.keys = self.values = torch.empty(0)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value (B, H_kv, L, D) -> both (B, H_kv, length + L, D). ValueError past max_length."""
        end = self.length + key.shape[2]
        if end > self.max_length:
            raise ValueError(f"the cache holds {self.max_length} positions, {end} were requested")
        if not self.keys.numel():  # device and dtype are those of the first keys, which autocast decides
            self.keys, self.values = key.new_zeros(self.shape), key.new_zeros(self.shape)
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, num_positions: int) -> None:
        self.length += num_positions


class ColumnCache:
    """Keys and values of every column of B rows, (layer, B, H_kv, L + 1, D), for rows that are at different places.

    `aim` says where the tokens of the next pass stand; `update` writes them there and returns all columns up to a
    `stop`. Whether a column holds anything worth seeing is the caller's to know. Column L is nobody's: rows that feed
    fewer tokens than the widest write their padding there.
    """

    length = 0  # what Transformer asks of a cache; positions are always given

    def __init__(self, config: ModelConfig, batch_size: int, num_columns: int):
        self.shape = (
            config.num_hidden_layers,
            batch_size,
            config.num_key_value_heads,
            num_columns + 1,
            config.head_dim,
        )
        self.max_length = num_columns
        self.keys = self.values = torch.empty(0)

    def aim(self, rows: Tensor | None, columns: Tensor | slice, stop: int) -> None:
        """rows (R,) int64, None = all; columns (R, W) int64, or one slice for all rows, which then are all."""
        self.rows, self.stop = rows, stop
        if isinstance(columns, slice):
            self.target: tuple = slice(None), slice(None), columns
        else:
            everyone = torch.arange(len(columns), device=columns.device) if rows is None else rows
            self.target = everyone[:, None], slice(None), columns

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these (R,), which become 0 to R - 1."""
        self.shape = self.shape[0], len(rows), *self.shape[2:]
        if self.keys.numel():
            self.keys, self.values = self.keys[:, rows], self.values[:, rows]

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value (R, H_kv, W, D) -> both (R, H_kv, stop, D)."""
        if not self.keys.numel():
            self.keys, self.values = key.new_zeros(self.shape), key.new_zeros(self.shape)
        return self._write(self.keys[layer], key), self._write(self.values[layer], value)

    def _write(self, stored: Tensor, new: Tensor) -> Tensor:
        # An index tensor on either side of a slice brings its dimensions to the front: (R, W, H_kv, D).
        stored[self.target] = new if isinstance(self.target[0], slice) else new.transpose(1, 2)
        return (stored if self.rows is None else stored[self.rows])[:, :, : self.stop]
