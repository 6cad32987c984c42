"""Key/value cache: the committed prefix of a batch of sequences."""

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
