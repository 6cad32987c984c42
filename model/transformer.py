"""The MiniMind/Llama-style transformer shared by the autoregressive and the diffusion track.

Shapes: B batch, L sequence, C hidden_size, H heads, D head_dim, V vocab_size. Module names are those of Hugging Face's
Llama, so weights move between the two by a prefix.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model.attention import AttentionMask, Visibility, attend, block_causal_mask, visibility
from model.config import ModelConfig
from model.kv_cache import Cache
from model.rotary import apply_rotary, inverse_frequencies, rotary_tables, yarn_frequencies

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def cast_once(x: Tensor) -> Tensor:
    """Return x in the autocast dtype, so that three projections need not cast it each.

    Not if gradients are recorded: autocast then casts for each projection, so that their gradients by x are summed in
    float32.
    """
    if torch.is_grad_enabled() or not torch.is_autocast_enabled(x.device.type):
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions and, on request, RMSNorm on queries and keys."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_size, kv_size = (
            heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        visible: Visibility,
        cache: Cache | None,
        select: Tensor | None,
    ) -> Tensor:
        # 1. Queries, keys and values: (B, L, H*D) -> (B, H, L, D).
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        # 2. Positions. Normalised queries come back in float32 under autocast; attention wants one dtype.
        q, k = (apply_rotary(norm(y), *rotary).to(v.dtype) for norm, y in ((self.q_norm, q), (self.k_norm, k)))
        # 3. Keys and values from outside this pass.
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
        # 4. The heads side by side, (B, L, H*D), projected where the output is wanted.
        mixed = attend(q, k, v, visible).transpose(1, 2).flatten(2)
        return self.o_proj(mixed if select is None else mixed.flatten(0, 1)[select])


class SwiGLU(nn.Module):
    """W_down (activation(W_gate x) * W_up x)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and a feed-forward network, each after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        visible: Visibility,
        cache: Cache | None,
        select: Tensor | None = None,
    ) -> Tensor:
        """x (B, L, C) -> (B, L, C), or (N, C) at the flat positions `select` (N,): these attend to all, and the output
        of the others is not computed."""
        mixed = self.self_attn(cast_once(self.input_layernorm(x)), rotary, visible, cache, select)
        x = (x if select is None else x.flatten(0, 1)[select]) + self.dropout(mixed)
        return x + self.dropout(self.mlp(cast_once(self.post_attention_layernorm(x))))


class Transformer(nn.Module):
    """Token ids to logits; without losses, noise or decoding."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        stretched, self.yarn_scale = yarn_frequencies(config)
        self.register_buffer("frequencies", inverse_frequencies(config), persistent=False)
        self.register_buffer("yarn_frequencies", stretched, persistent=False)
        self.context_length = config.max_position_embeddings  # longest sequence to come, see set_context
        self._init_weights()

    def _init_weights(self) -> None:
        """Normal(0, 0.02); projections back into the residual stream scaled down by the number of such additions."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(
                    parameter, std=0.02 / math.sqrt(2 * self.config.num_hidden_layers) if residual else 0.02
                )

    def set_context(self, length: int) -> None:
        """Declare the longest sequence to come, in tokens; raises ValueError if the model does not accept as many.

        It decides whether rotary positions are stretched by YaRN: for all sequences of one context or for none, since a
        document must cost the same alone, packed and padded, and keys in a cache must agree with later queries.
        """
        self.config.require_length(length, "--max-seq-len")
        self.context_length = length

    def num_parameters(self) -> int:
        """Return the number of distinct parameters; a tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def forward(
        self,
        input_ids: Tensor,
        *,
        attn_mask: AttentionMask | None = None,
        is_causal: bool = False,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        select: Tensor | None = None,
        perturbation: Tensor | None = None,
        head: bool = True,
    ) -> Tensor:
        """input_ids (B, L) -> logits (B, L, V), or (N, V) at the flat positions `select` (N,) of B*L.

        With `select` the head, a tenth to a quarter of the arithmetic, and the MLP of the last layer run only where
        their output is wanted.
        attn_mask: bool (B or 1, 1, L, L_key), True = may attend; or a BlockMask; None = full attention.
        is_causal: causal attention; exclusive with attn_mask (ValueError).
        position_ids: (B or 1, L); default counts up from the cache length.
        cache: the current tokens are written after its prefix; the caller advances it.
        perturbation: (B, up to L, C), added to the embeddings of the first tokens.
        head: False returns the hidden states instead of the logits, (B, L, C) or (N, C).
        """
        if attn_mask is not None and is_causal:
            raise ValueError("pass attn_mask or is_causal, not both")
        length, start = input_ids.shape[1], cache.length if cache is not None else 0
        # 1. Positions, and what attends to what.
        if position_ids is None:
            self.config.require_length(start + length)
            position_ids = torch.arange(start, start + length, device=input_ids.device)[None]
        if is_causal and start:  # SDPA aligns its causal mask to the first key; here the queries come last
            attn_mask = block_causal_mask(start + length, 1, input_ids.device)[:, :, start:] if length > 1 else None
            is_causal = False
        # 2. Embeddings (B, L, C).
        x = self.embed_tokens(input_ids)
        if perturbation is not None:
            x = x + F.pad(perturbation, (0, 0, 0, length - perturbation.shape[1]))
        # 3. Layers (B, L, C); the last one gives (N, C) if positions are selected.
        rotary, visible = self._rotary(position_ids), visibility(attn_mask, is_causal, x)
        for layer in self.layers[:-1]:
            x = layer(x, rotary, visible, cache)
        visible = visible if select is None else visible.of_selected()
        x = self.norm(self.layers[-1](x, rotary, visible, cache, select=select))
        # 4. Logits.
        return self.lm_head(x) if head else x

    def _rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rotary tables of these positions, stretched if the context is longer than the original one: that
        of the command, or in MiniMind the longest that the model accepts."""
        config = self.config
        context = config.max_position_embeddings if config.rope_variant == "minimind" else self.context_length
        if config.inference_rope_scaling and context > config.rope_original_length:
            return rotary_tables(position_ids, self.yarn_frequencies, self.yarn_scale)
        return rotary_tables(position_ids, self.frequencies)
