"""Rotary position embedding (RoFormer, arXiv:2104.09864) and its YaRN stretching (arXiv:2309.00071).

Tables are computed from the positions at each call, in float32: a few thousand cosines cost nothing beside one layer.
Shapes: B rows, H heads, L positions, D head_dim.
"""

import math

import torch
from torch import Tensor

from model.config import ModelConfig

# YaRN, section 3.2: dimensions turning more than BETA_FAST times over the original context keep their frequency,
# those turning fewer than BETA_SLOW times are interpolated, a linear ramp lies between.
BETA_FAST, BETA_SLOW = 32.0, 1.0


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Return the radians per position of every pair of dimensions, (D / 2,) float32."""
    return config.rope_theta ** -(torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)


def yarn_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Return inverse frequencies (D / 2,) stretched by `rope_factor` (YaRN, section 3.2), and the factor on cos and sin
    (3.4), which MiniMind leaves out."""
    plain = inverse_frequencies(config)

    def dimension(turns: float) -> float:
        """Return the (real-valued) dimension that turns so often over the original context."""
        return (
            config.head_dim
            * math.log(config.rope_original_length / (turns * 2 * math.pi))
            / (2 * math.log(config.rope_theta))
        )

    # 1. The ramp: 0 up to `low`, whose frequencies are kept, 1 from `high` on, whose frequencies are divided. MiniMind
    #    ends it at the last pair.
    minimind = config.rope_variant == "minimind"
    low = max(math.floor(dimension(BETA_FAST)), 0)
    high = min(math.ceil(dimension(BETA_SLOW)), config.head_dim // 2 - 1 if minimind else config.head_dim - 1)
    ramp = ((torch.arange(config.head_dim // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
    # 2. Both, mixed by the ramp; the factor makes up for the lower entropy of attention over more keys.
    scale = 1.0 if minimind else 0.1 * math.log(config.rope_factor) + 1.0
    return plain / config.rope_factor * ramp + plain * (1 - ramp), scale


def rotary_tables(position_ids: Tensor, frequencies: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """position_ids (B or 1, L) -> cos and sin for `apply_rotary`, each (B or 1, 1, L, D) float32: halves repeated, the
    first of sin negative."""
    angles = position_ids[:, None, :, None].float() * frequencies
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, H, L, D) by cos, sin (B or 1, 1, L, D) in float32; returns the dtype of x."""
    swapped = x.unflatten(-1, (2, -1)).flip(-2).flatten(-2)  # torch.compile vectorises flip, but not cat
    return (x * cos + swapped * sin).to(x.dtype)
