"""What is put to a model: a prompt to go on from, or a text whose blanks are filled, and their tokens."""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

from dataset.tokenizer import PreTrainedTokenizerFast, encode, encode_batch, encode_chat
from scripts.engine.loaded import Loaded

BLANK = re.compile("_{3,}")

Conversation = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Prompt:
    """A text to continue, or a conversation to answer."""

    content: str | Conversation
    control: bool = False  # control tokens that it spells are those tokens, not text

    @property
    def text(self) -> str:
        """The text, or the last message of the conversation."""
        return self.content if isinstance(self.content, str) else self.content[-1]["content"]

    @property
    def system(self) -> str | None:
        """The system prompt of a conversation that has one."""
        return None if isinstance(self.content, str) else system_of(self.content)

    def encode(self, tokenizer: PreTrainedTokenizerFast) -> list[int]:
        """Ids: BOS and the text, or the conversation up to the open turn of the assistant. ValueError for [MASK]."""
        if isinstance(self.content, str):
            ids = [tokenizer.bos_token_id, *encode(tokenizer, self.content, self.control)]
        else:
            ids = encode_chat(tokenizer, self.content, add_generation_prompt=True, control=self.control)
        refuse_mask(tokenizer, ids, "the prompt")
        return ids


Ask = Callable[[str], Prompt]


@dataclass(frozen=True)
class Blanks:
    """A text whose blanks, runs of three or more underscores, are filled."""

    text: str
    blank_tokens: int  # in place of each blank
    conversation: Conversation | None = None  # that the text replies to; None: it is a document of its own
    control: bool = False  # control tokens that both spell are those tokens; a [MASK] of the text is a blank, too

    @property
    def system(self) -> str | None:
        """The system prompt of the conversation, if there are both."""
        return system_of(self.conversation or ())

    def encode(self, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int | None], int]:
        """Ids, with None for each token of a blank, and the position at which the text begins.

        A document stands between BOS and EOS, a reply between the opened turn and EOS. The pieces between the blanks
        are tokenised apart. ValueError without a blank.
        """
        row: list[int | None] = [tokenizer.bos_token_id]
        if self.conversation is not None:
            row = [*encode_chat(tokenizer, self.conversation, add_generation_prompt=True, control=self.control)]
            refuse_mask(tokenizer, row, "what the text replies to")
        start = len(row)
        for i, piece in enumerate(BLANK.split(self.text)):
            row += [None] * (self.blank_tokens if i else 0)
            ids = encode(tokenizer, piece, self.control)
            row += [None if token == tokenizer.mask_token_id else token for token in ids]
        if None not in row:
            raise ValueError("--infill has no blank: write ___ (three or more underscores) where text is missing")
        return [*row, tokenizer.eos_token_id], start


def system_of(messages: Conversation) -> str | None:
    return messages[0]["content"] if messages and messages[0]["role"] == "system" else None


@dataclass(frozen=True)
class SystemConfig:
    """The system prompt."""

    system: Annotated[
        str, "system prompt, ahead of what is asked in the chat template; a conversation's own is kept (empty: none)"
    ] = ""

    def opened(self, messages: Conversation) -> Conversation:
        """The conversation behind the system prompt, unless it is empty or the conversation has its own."""
        if not self.system or any(message["role"] == "system" for message in messages):
            return messages
        return [{"role": "system", "content": self.system}, *messages]


NO_SYSTEM = SystemConfig()


@dataclass(frozen=True)
class PromptConfig(SystemConfig):
    """Prompts."""

    chat_wrap: Annotated[
        bool | None, "put it into the chat template (none: if the checkpoint was trained on conversations)"
    ] = None

    def wraps(self, loaded: Loaded) -> bool:
        """Return whether prompts are put into the chat template. ValueError if not, and there is a system prompt."""
        wraps = loaded.chat if self.chat_wrap is None else self.chat_wrap
        if self.system and not wraps:
            raise ValueError("--system has no effect outside the chat template (--chat-wrap); leave it out")
        return wraps

    def prompt(self, text: str, loaded: Loaded) -> Prompt:
        """The text itself, or the conversation that it opens."""
        return Prompt(self.opened([{"role": "user", "content": text}]) if self.wraps(loaded) else text)

    def asking(self, loaded: Loaded) -> Ask:
        """Return what makes a prompt of a question."""
        return partial(self.prompt, loaded=loaded)


@dataclass(frozen=True)
class TypedPromptConfig(PromptConfig):
    """Prompts that are typed."""

    control_tokens: Annotated[
        bool,
        "what is typed and spells control tokens, such as <|im_end|>, holds those tokens; <|mask|> is a blank of one "
        "token in a text whose blanks are filled, and refused elsewhere",
    ] = False

    def prompt(self, text: str, loaded: Loaded) -> Prompt:
        return replace(super().prompt(text, loaded), control=self.control_tokens)

    def blanks(self, text: str, blank_tokens: int, prompt: str | None, loaded: Loaded) -> Blanks:
        """The text as a reply to the prompt in the chat template, or as a document without prompt outside of it."""
        if not self.wraps(loaded):
            if prompt is not None:
                raise ValueError(
                    "--prompt has no effect on --infill outside the chat template (--chat-wrap); leave it out"
                )
            return Blanks(text, blank_tokens, control=self.control_tokens)
        if prompt is None:
            raise ValueError("--infill in the chat template needs --prompt, which it replies to; or --no-chat-wrap")
        return Blanks(text, blank_tokens, self.prompt(prompt, loaded).content, self.control_tokens)


def note_on_template(loaded: Loaded, wraps: bool) -> str | None:
    """A sentence for checkpoints to which a prompt means something else than one might think."""
    if loaded.chat:
        return None
    effect = "the chat template is new to it" if wraps else "it goes on with the text that it is given"
    return f"{loaded.path} was not trained on conversations: {effect}"


def prompt_tokens(
    tokenizer: PreTrainedTokenizerFast, prompt: Prompt, max_new_tokens: int, max_length: int
) -> list[int]:
    """Ids of a prompt, never cut: ValueError if they and the continuation exceed `max_length`, the context in use."""
    ids = prompt.encode(tokenizer)
    if len(ids) + max_new_tokens > max_length:
        refuse_long_system(tokenizer, prompt, max_new_tokens, max_length)
        raise ValueError(
            f"the prompt's {len(ids)} tokens and --max-new-tokens {max_new_tokens} exceed --max-seq-len {max_length}; "
            "shorten the prompt, or lower --max-new-tokens"
        )
    return ids


def refuse_long_system(
    tokenizer: PreTrainedTokenizerFast, prompt: Prompt, max_new_tokens: int, max_length: int
) -> None:
    """Raise ValueError if a conversation's system prompt leaves no room even for an empty message."""
    if prompt.system is None:
        return
    empty = replace(prompt, content=[prompt.content[0], {"role": "user", "content": ""}])
    size = len(empty.encode(tokenizer))
    if size + max_new_tokens > max_length:
        raise ValueError(
            f"--system and the chat template are {size} tokens, which with --max-new-tokens {max_new_tokens} exceed "
            f"--max-seq-len {max_length}; shorten --system, or lower --max-new-tokens"
        )


def fitting(loaded: Loaded, prompt: Prompt, room: int) -> Prompt:
    """The conversation without its oldest exchanges, as many as must go so that `room` more tokens fit the context. The
    system prompt and the last message remain, even if they are too long."""
    kept = 0 if prompt.system is None else 1
    for start in range(kept, len(prompt.content), 2):
        recent = replace(prompt, content=[*prompt.content[:kept], *prompt.content[start:]])
        with contextlib.suppress(ValueError):
            prompt_tokens(loaded.tokenizer, recent, room, loaded.max_length)
            return recent
    return replace(prompt, content=[*prompt.content[:kept], prompt.content[-1]])


def condition_and_responses(
    tokenizer: PreTrainedTokenizerFast, prompt: Prompt, responses: list[str]
) -> tuple[list[int], list[list[int]]]:
    """Ids of a prompt and of each response to it, as they are scored.

    Outside the chat template the white space at the end of the prompt is moved to the responses: the token of a word
    begins with its space.
    """
    if not isinstance(prompt.content, str):
        return prompt.encode(tokenizer), encode_batch(tokenizer, responses, prompt.control)
    text = prompt.content.rstrip()
    space = prompt.content[len(text) :]
    condition = replace(prompt, content=text).encode(tokenizer)
    return condition, encode_batch(tokenizer, [space + response for response in responses], prompt.control)


def refuse_mask(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int | None], what: str) -> None:
    """Raise ValueError if `ids` hold [MASK]: only the text of --infill has blanks."""
    if tokenizer.mask_token_id in ids:
        raise ValueError(
            f"{what} holds {tokenizer.mask_token}, which a diffusion model fills in the text of --infill alone; leave "
            "it out, or --control-tokens, which makes it more than text"
        )
