"""Key/value caches: of a committed prefix that grows at its end, and of columns that are written anywhere."""

import torch
from torch import Tensor

from model.config import ModelConfig


class _Layers:
    """Keys and values of every layer, each (B, H_kv, columns, D) and contiguous; made by the first write, since device
    and dtype are those of the first keys, which autocast decides."""

    def __init__(self, config: ModelConfig, num_rows: int, num_columns: int):
        self.shape = num_rows, config.num_key_value_heads, num_columns, config.head_dim
        self.num_layers = config.num_hidden_layers
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def keep(self, rows: Tensor) -> None:
        """Forget all rows but these (R,), which become 0 to R - 1."""
        self.shape = len(rows), *self.shape[1:]
        self.keys, self.values = ([one.index_select(0, rows) for one in all_] for all_ in (self.keys, self.values))

    def _stored(self, layer: int, key: Tensor) -> tuple[Tensor, Tensor]:
        if not self.keys:  # zeros: what is masked counts for nothing, but for a NaN in it
            self.keys, self.values = ([key.new_zeros(self.shape) for _ in range(self.num_layers)] for _ in range(2))
        return self.keys[layer], self.values[layer]


class KVCache(_Layers):
    """Keys and values of the committed prefix of B rows, preallocated for `max_length` columns.

    `update` writes the current tokens after the prefix and returns prefix + current; calling it again overwrites the
    same slots. Only `advance` makes them part of the prefix, so a block can be denoised for many steps against one
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
        keys, values = self._stored(layer, key)
        keys.narrow(2, self.length, size).copy_(key)
        values.narrow(2, self.length, size).copy_(value)
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def advance(self, num_positions: int) -> None:
        self.length += num_positions


class ColumnCache(_Layers):
    """Keys and values of every column of B rows, for rows that are at different places.

    `aim` says where the tokens of the next pass stand; `update` writes them there and returns all columns up to a
    `stop`. Whether a column holds anything worth seeing is the caller's to know. Behind the last column L there is one
    that is nobody's: rows that feed fewer tokens than the widest write their padding there.
    """

    length = 0  # what Transformer asks of a cache; positions are always given

    def __init__(self, config: ModelConfig, batch_size: int, num_columns: int):
        super().__init__(config, batch_size, num_columns + 1)
        self.max_length = num_columns

    def aim(self, rows: Tensor | None, columns: Tensor | slice, stop: int) -> None:
        """rows (R,) int64, None = all; columns (R, W) int64, or one slice for all rows, which then are all."""
        self.rows, self.stop, self.target = rows, stop, columns
        if not isinstance(columns, slice):
            _, heads, width, _ = self.shape  # the place of (row, head, column) among all vectors of a layer
            everyone = torch.arange(len(columns), device=columns.device) if rows is None else rows
            first = everyone[:, None] * heads + torch.arange(heads, device=columns.device)
            self.target = (first[:, :, None] * width + columns[:, None]).flatten()

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """key, value (R, H_kv, W, D) -> both (R, H_kv, stop, D)."""
        return tuple(self._write(*pair) for pair in zip(self._stored(layer, key), (key, value), strict=True))

    def _write(self, stored: Tensor, new: Tensor) -> Tensor:
        if isinstance(self.target, slice):
            stored.narrow(2, self.target.start, new.shape[2]).copy_(new)
        else:
            stored.view(-1, stored.shape[-1]).index_copy_(0, self.target, new.reshape(-1, new.shape[-1]))
        return (stored if self.rows is None else stored.index_select(0, self.rows)).narrow(2, 0, self.stop)
