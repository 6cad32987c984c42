"""Architecture of the shared transformer; saved inside every checkpoint."""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from model.ranges import check_ranges

# Settings that leave every tensor as it is; a stage may set them anew for weights it starts from.
ADJUSTABLE = ("inference_rope_scaling", "dropout")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the network, the token ids it was built for, and how its weights were trained.

    The same config builds the autoregressive and the diffusion model: causality is an argument of
    `Transformer.forward`, not a property of the weights. Raises ValueError on impossible shapes.
    """

    hidden_size: Annotated[int, "width of the residual stream", "at least 1"] = 512
    num_hidden_layers: Annotated[int, "transformer layers", "at least 1"] = 8
    num_attention_heads: Annotated[int, "query heads", "at least 1"] = 8
    num_key_value_heads: Annotated[
        int | None, "key/value heads, fewer = grouped-query attention (none: as many as query heads)", "at least 1"
    ] = None
    intermediate_size: Annotated[
        int | None, "SwiGLU inner width (none: 8/3 of hidden_size, rounded up to 64)", "at least 1"
    ] = None
    dropout: Annotated[float, "dropout probability of attention and MLP outputs", "in [0, 1)"] = 0.0
    hidden_act: Annotated[Literal["relu", "gelu", "silu"], "activation of the gate"] = "silu"
    rms_norm_eps: Annotated[float, "epsilon of RMSNorm", "at least 0"] = 1e-5
    rope_theta: Annotated[float, "rotary base frequency", "above 1"] = 1e6
    max_position_embeddings: Annotated[int, "longest sequence, in tokens, that the model accepts", "at least 1"] = 32768
    inference_rope_scaling: Annotated[
        bool, "YaRN where --max-seq-len exceeds the original context of 2048 tokens; below it, plain rotary"
    ] = False
    qk_norm: Annotated[bool, "RMSNorm on queries and keys (as in Qwen3)"] = False
    tie_embeddings: Annotated[bool, "one matrix for the embedding and the head"] = False

    # Set from the tokenizer, see dataset.tokenizer.token_ids.
    vocab_size: int = 6400
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2
    mask_token_id: int = 3
    # Set by training: who saw whom, and so how the weights expect to be decoded.
    # "joint": causal and in blocks at once, see `kinds`; a token that is written sees itself and those before it.
    attention: Literal["causal", "full", "block", "joint"] = "causal"
    block_size: int = 0  # "block", "joint": tokens denoised together, each block given the clean ones before it
    # YaRN, arXiv:2309.00071; the context of the original weights and how far it is stretched.
    rope_original_length: int = 2048
    rope_factor: float = 16.0
    # How inference_rope_scaling stretches: "yarn" only contexts beyond the original one, and with YaRN's factor on
    # attention; "minimind", for weights from there, at every length and without that factor.
    rope_variant: Literal["yarn", "minimind"] = "yarn"
    head_dim: int | None = None  # none: hidden_size / num_attention_heads; imported weights may have another

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.intermediate_size is None:
            object.__setattr__(self, "intermediate_size", -(-8 * self.hidden_size // 3 // 64) * 64)
        check_ranges(ModelConfig, vars(self))
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, not {self.vocab_size}")
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"--hidden-size {self.hidden_size} is not a multiple of "
                    f"--num-attention-heads {self.num_attention_heads}"
                )
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"--hidden-size / --num-attention-heads is {self.head_dim}; rotary positions need an even number"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"--num-attention-heads {self.num_attention_heads} is not a multiple of "
                f"--num-key-value-heads {self.num_key_value_heads}"
            )
        if (self.attention in ("block", "joint")) != (self.block_size > 0):
            raise ValueError(f"block_size {self.block_size} does not go with attention {self.attention!r}")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The ways in which the weights can be used: "autoregressive", "diffusion", or both."""
        return {"causal": ("autoregressive",), "joint": ("autoregressive", "diffusion")}.get(
            self.attention, ("diffusion",)
        )

    def as_kind(self, kind: str) -> "ModelConfig":
        """Return the config by which these weights are used as one of `kinds`: a joint model is causal, or in blocks
        whose clean tokens attend causally. Raises ValueError for a kind that they are not."""
        if kind not in self.kinds:
            raise ValueError(f"attention {self.attention!r} is not {kind}")
        return replace(self, attention="causal", block_size=0) if kind == "autoregressive" else self

    @property
    def autoregressive(self) -> bool:
        """True if a token is predicted at the one before it; else it is at its own place, by diffusion. A joint model
        is used by diffusion until `as_kind` says otherwise."""
        return self.attention == "causal"

    def require_length(self, length: int, what: str = "the sequence") -> None:
        """Raise ValueError if `length` tokens are more than the model accepts."""
        if length > self.max_position_embeddings:
            raise ValueError(
                f"{what} is {length} tokens long, the model accepts at most {self.max_position_embeddings} "
                "(--max-position-embeddings of its training)"
            )
