"""Prompts through a decoder, timed: the text as a user would see it, and what it cost."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch

from dataset.tokenizer import PreTrainedTokenizerFast, decode, encode, encode_chat
from model.decode import Canvas, ContinuationConfig, Decoded, DecodingStep, DenoisingConfig, SamplingConfig
from model.decode import decode as fill
from model.transformer import Transformer
from scripts.engine.likelihood.documents import Loaded, refuse_mask
from scripts.engine.runtime import RuntimeConfig

BLANK = re.compile("_{3,}")

Conversation = Sequence[dict[str, str]]
Prompt = str | Conversation  # a text to go on with, or a conversation to answer
Watch = Callable[[DecodingStep], None]
Observe = Callable[[Canvas], Watch]  # told the canvas, gives what sees every step of it


@dataclass(frozen=True)
class PromptConfig:
    """How a prompt is put to the model."""

    chat_wrap: Annotated[
        bool | None, "put it into the chat template (none: if the checkpoint was trained on conversations)"
    ] = None

    def wraps(self, loaded: Loaded) -> bool:
        return loaded.speaks_chat if self.chat_wrap is None else self.chat_wrap

    def put(self, text: str, loaded: Loaded) -> Prompt:
        """The text itself, or the conversation that it opens."""
        return [{"role": "user", "content": text}] if self.wraps(loaded) else text

    def replied_to(self, text: str | None, loaded: Loaded) -> Conversation | None:
        """The conversation that an infilled text replies to; None, and no prompt, outside the chat template."""
        if self.wraps(loaded) and text is None:
            raise ValueError("--infill in the chat template needs --prompt, which it replies to; or --no-chat-wrap")
        if not self.wraps(loaded) and text is not None:
            raise ValueError("--prompt has no effect on --infill outside the chat template (--chat-wrap); leave it out")
        return None if text is None else self.put(text, loaded)


@dataclass(frozen=True)
class TypedPromptConfig(PromptConfig):
    """How a prompt is put to the model."""

    control_tokens: Annotated[
        bool,
        "what is typed and spells control tokens, such as <|im_end|>, holds those tokens; <|mask|> is a blank of one "
        "token in a text whose blanks are filled, and refused elsewhere",
    ] = False


@dataclass(frozen=True)
class Generation:
    prompt: str  # what the user wrote; where blanks were filled, the text with its blanks
    text: str  # the continuation up to EOS, or the text with its blanks filled
    num_tokens: int  # written: up to EOS, that included, or in the blanks
    ended: bool  # EOS was produced, or stands behind the blanks
    num_forward_passes: int  # those that the row would take alone
    seconds: float  # of the whole batch
    filled: bool = False  # blanks were

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def tokens_per_pass(self) -> float:
        return self.num_tokens / self.num_forward_passes

    def report(self) -> str:
        between = "\n" if self.filled else "\u2502"  # a text with blanks is not what the filled one goes on
        return (
            f"{self.prompt}{between}{self.text}\n[{self.num_tokens} tokens{'' if self.ended else ', no EOS'}, "
            f"{self.num_forward_passes} forward passes, {self.seconds:.2f} s, "
            f"{self.tokens_per_second:.1f} tokens/s, "
            f"{self.tokens_per_pass:.2f} tokens per pass]"
        )


def idle_sampling_flags(*configs: SamplingConfig | DenoisingConfig) -> dict[str, tuple[bool, str]]:
    """For `refuse_idle`: the flags of sampling that have an effect only with another one's value."""
    needs: dict[str, tuple[bool, str]] = {}
    for config in configs:
        prefix, temperature = ("gen", "temp") if isinstance(config, DenoisingConfig) else ("ar", "temperature")
        random = config.draw.temperature > 0, f"a positive --{prefix}-{temperature}"
        needs |= {f"{prefix}_top_k": random, f"{prefix}_top_p": random}
        needs[f"{prefix}_repeat_window"] = config.draw.repeat_penalty > 0, f"a positive --{prefix}-repeat-penalty"
        if isinstance(config, DenoisingConfig):
            policy, capped = config.gen_remasking, "--gen-remasking threshold or factor"
            confident = policy in ("threshold", "hybrid")
            needs["gen_confidence_threshold"] = confident, "--gen-remasking threshold or hybrid"
            needs["gen_factor"] = policy == "factor", "--gen-remasking factor"
            for name in ("gen_cap_start_ratio", "gen_cap_end_ratio", "gen_max_decode_per_step"):
                needs[name] = policy in ("threshold", "factor"), capped
            needs["gen_fuse_commit"] = config.gen_cache in ("auto", "block"), "--gen-cache block"
    return needs


def in_effect(config: SamplingConfig | DenoisingConfig) -> dict[str, Any]:
    """The settings that have an effect beside each other, by name."""
    idle = {name for name, (used, _) in idle_sampling_flags(config).items() if not used}
    return {name: value for name, value in asdict(config).items() if name not in idle}


def prompt_tokens(
    tokenizer: PreTrainedTokenizerFast, prompt: Prompt, max_new_tokens: int, max_length: int, control: bool = False
) -> list[int]:
    """BOS and the text's ids, or the conversation's up to the open turn of the assistant.

    Never cut: ValueError if with the continuation they exceed `max_length`, the canvas trained on. control: the prompt
    may hold control tokens, but for [MASK] (ValueError): what is filled stands behind it.
    """
    if isinstance(prompt, str):
        ids = [tokenizer.bos_token_id, *encode(tokenizer, prompt, control)]
    else:
        ids = encode_chat(tokenizer, prompt, add_generation_prompt=True, control=control)
    refuse_mask(tokenizer, ids, "the prompt")
    if len(ids) + max_new_tokens > max_length:
        raise ValueError(
            f"the prompt's {len(ids)} tokens and --max-new-tokens {max_new_tokens} exceed --max-seq-len {max_length}; "
            "shorten the prompt, or lower --max-new-tokens"
        )
    return ids


def generate(
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Prompt,
    continuation: ContinuationConfig,
    config: SamplingConfig | DenoisingConfig,
    runtime: RuntimeConfig,
    max_length: int,
    observe: Observe | None = None,
    control: bool = False,
) -> Generation:
    """Continue a text, or answer a conversation, as `config` says, `observe` looking on; control: see
    `prompt_tokens`."""
    return generate_batch(model, tokenizer, [prompt], continuation, config, runtime, max_length, observe, control)[0]


def generate_batch(
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    continuation: ContinuationConfig,
    config: SamplingConfig | DenoisingConfig,
    runtime: RuntimeConfig,
    max_length: int,
    observe: Observe | None = None,
    control: bool = False,
) -> list[Generation]:
    """`generate` for several prompts that share forward passes; prompt i is sampled with the seed plus i."""
    rows = [prompt_tokens(tokenizer, prompt, continuation.max_new_tokens, max_length, control) for prompt in prompts]
    canvas = Canvas.continuing(rows, continuation.max_new_tokens, model.config, runtime.torch_device)
    decoded, seconds = decode_timed(
        model, canvas, config, row_seeds(continuation, runtime, len(rows)), runtime, observe
    )
    return [
        Generation(
            prompt=prompt if isinstance(prompt, str) else prompt[-1]["content"],
            text=decode(tokenizer, new),
            num_tokens=len(new),
            ended=ended,
            num_forward_passes=passes,
            seconds=seconds,
        )
        for prompt, new, ended, passes in zip(prompts, decoded.new, decoded.ended, decoded.row_passes, strict=True)
    ]


def infill(
    model: Transformer,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    blank_tokens: int,
    conversation: Conversation | None,
    continuation: ContinuationConfig,
    config: DenoisingConfig,
    runtime: RuntimeConfig,
    max_length: int,
    observe: Observe | None = None,
    control: bool = False,
) -> Generation:
    """Fill the blanks of a text; see `text_with_blanks`."""
    row, start = text_with_blanks(tokenizer, text, blank_tokens, conversation, control)
    if len(row) > max_length:
        raise ValueError(f"the text with its blanks is {len(row)} tokens long, more than --max-seq-len {max_length}")
    canvas = Canvas.infilling([row], model.config, runtime.torch_device)
    decoded, seconds = decode_timed(model, canvas, config, row_seeds(continuation, runtime, 1), runtime, observe)
    filled = decode(tokenizer, decoded.canvas[0, start:-1].tolist())
    return Generation(text, filled, len(decoded.new[0]), True, decoded.num_forward_passes, seconds, filled=True)


def text_with_blanks(
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    blank_tokens: int,
    conversation: Conversation | None = None,
    control: bool = False,
) -> tuple[list[int | None], int]:
    """Ids of a text, `blank_tokens` None for each run of three or more underscores, and where the text begins.

    The text is a document of its own, BOS before and EOS behind it, or the assistant's reply to `conversation`, EOS
    behind it. What stands between blanks is tokenised apart. control: text and conversation may hold control tokens,
    and every [MASK] of the text is a blank of one token, too. ValueError without a blank.
    """
    row: list[int | None] = [tokenizer.bos_token_id]
    if conversation is not None:
        row = [*encode_chat(tokenizer, conversation, add_generation_prompt=True, control=control)]
        refuse_mask(tokenizer, row, "what the text replies to")
    start, mask = len(row), tokenizer.mask_token_id
    for i, piece in enumerate(BLANK.split(text)):
        row += [None] * (blank_tokens if i else 0)
        row += [None if token == mask else token for token in encode(tokenizer, piece, control)]
    if None not in row:
        raise ValueError("--infill has no blank: write ___ (three or more underscores) where text is missing")
    return [*row, tokenizer.eos_token_id], start


def row_seeds(continuation: ContinuationConfig, runtime: RuntimeConfig, num_rows: int) -> list[int]:
    """Row i has the seed plus i."""
    first = runtime.seed if continuation.gen_seed is None else continuation.gen_seed
    return [first + i for i in range(num_rows)]


def decode_timed(
    model: Transformer,
    canvas: Canvas,
    config: SamplingConfig | DenoisingConfig,
    seeds: Sequence[int],
    runtime: RuntimeConfig,
    observe: Observe | None = None,
) -> tuple[Decoded, float]:
    """The filled canvas, and the seconds that took, until the device had done its work."""
    model.eval()
    watch = None if observe is None else observe(canvas)
    _synchronise(runtime.torch_device)
    started = time.perf_counter()
    with runtime.autocast():
        decoded = fill(model, canvas, config, seeds, watch)
    _synchronise(runtime.torch_device)
    return decoded, time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    """Wait for the work queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
