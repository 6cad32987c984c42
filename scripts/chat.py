"""Talk to a checkpoint of either kind; a diffusion model's reply is shown while it is denoised.

    uv run python -m scripts.chat --checkpoint weights/diffusion_sft_state_dict.pt

Type /help for the commands. Lines may also come from a file or a pipe.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

from model.canvas import Canvas
from model.decode import ContinuationConfig, DenoisingConfig, SamplingConfig
from scripts.engine.cli import parse_args, refuse_idle, run
from scripts.engine.evaluation import CheckpointConfig, Loaded
from scripts.engine.generation import (
    Generation,
    Prompt,
    PromptConfig,
    generate,
    idle_sampling_flags,
    infill,
    prompt_tokens,
)
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.trace import Trace, check_trace_path, write_trace
from scripts.engine.trace_terminal import LiveView
from scripts.engine.watching import Typing, Watch

HELP = """\
/help             this list and the settings
/reset            forget the conversation
/steps N          denoising steps of a reply
/temp T           sampling temperature, 0 = the likeliest token
/block N          tokens denoised together, from left to right; 0 = the whole reply at once
/policy NAME      which predictions a denoising step keeps: {policies}
/infill TEXT      fill the blanks (___) of TEXT; as a reply to the last message, if there is one
/trace FILE       write the last reply, step by step, to FILE.html, .gif or .json
/quit             leave (so does Ctrl-D; Ctrl-C stops a reply)"""


@dataclass(frozen=True)
class ChatConfig:
    """The conversation."""

    live: Annotated[bool | None, "show a reply while it is written (none: if the output is a terminal)"] = None
    blank_tokens: Annotated[int, "tokens in place of each blank of /infill"] = 8

    def __post_init__(self):
        if self.blank_tokens < 1:
            raise ValueError(f"--blank-tokens must be at least 1, not {self.blank_tokens}")


class Leave(Exception):
    """The user wants to go."""


class Chat:
    """A conversation with one checkpoint. `answer` takes a line that the user typed and prints what comes of it."""

    def __init__(
        self,
        loaded: Loaded,
        config: SamplingConfig | DenoisingConfig,
        continuation: ContinuationConfig,
        prompting: PromptConfig,
        chat: ChatConfig,
        runtime: RuntimeConfig,
        max_length: int,
    ):
        self.loaded, self.config, self.continuation, self.runtime = loaded, config, continuation, runtime
        self.chat, self.max_length = chat, max_length
        self.wraps = prompting.wraps(loaded)
        self.live = sys.stdout.isatty() if chat.live is None else chat.live
        self.messages: list[dict[str, str]] = []
        self.trace: Trace | None = None
        self.asked = ""  # what the last reply replies to
        self.replies = 0

    @property
    def is_diffusion(self) -> bool:
        return isinstance(self.config, DenoisingConfig)

    def answer(self, line: str) -> None:
        """ValueError, in one sentence, for what cannot be done; Leave on /quit."""
        name, _, rest = line.strip().partition(" ")
        if not name:
            return
        if not name.startswith("/"):
            self._reply(line.strip())
        elif name in COMMANDS:
            COMMANDS[name](self, rest.strip())
        else:
            raise ValueError(f"{name} is no command; /help lists them")

    # -- replies ---------------------------------------------------------------------------------------------------

    def _reply(self, text: str) -> None:
        self.asked = text
        if not self.wraps:
            self._show(generate, text)
            return
        messages = self._within_reach([*self.messages, {"role": "user", "content": text}])
        made = self._show(generate, messages)
        self.messages = [*messages, {"role": "assistant", "content": made.text}]

    def _within_reach(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """The conversation without as many of its oldest exchanges as must go to leave room for a reply."""
        dropped = 0
        while True:
            try:
                prompt_tokens(
                    self.loaded.tokenizer, messages[dropped:], self.continuation.max_new_tokens, self.max_length
                )
            except ValueError:
                if dropped + 2 >= len(messages):
                    raise
                dropped += 2
                continue
            if dropped:
                print(f"({dropped // 2} of the oldest exchanges no longer fit and are forgotten)")
            return messages[dropped:]

    def _show(self, make: Callable[..., Generation], *what: Prompt | str | int | None) -> Generation:
        """Run `make` on `what`, showing and recording it; a reply that is interrupted leaves no trace."""
        continuation = replace(self.continuation, gen_seed=(self._first_seed + self.replies) % 2**32)
        made = make(
            self.loaded.model,
            self.loaded.tokenizer,
            *what,
            continuation,
            self.config,
            self.runtime,
            self.max_length,
            self._observe,
        )
        self.replies += 1
        print(made.text if not self.live or self.is_diffusion else "")
        speed = made.num_tokens / made.seconds
        print(f"[{made.num_tokens} tokens, {made.num_forward_passes} passes, {speed:.0f} tokens/s]")
        return made

    @property
    def _first_seed(self) -> int:
        return self.runtime.seed if self.continuation.gen_seed is None else self.continuation.gen_seed

    def _observe(self, canvas: Canvas) -> Watch:
        """Keep a trace, and show what is being written: a canvas that fills up, or a text that grows."""
        self.trace = Trace(self.loaded.tokenizer, canvas.ids[0], canvas.open[0], {"prompt": self.asked})
        if not self.live:
            return self.trace.add
        start = int(canvas.open[0].int().argmax())
        if self.is_diffusion:
            return LiveView(self.trace, stream=sys.stdout, start=start)
        return Typing(self.trace, start, sys.stdout)

    # -- commands --------------------------------------------------------------------------------------------------

    def help(self, _: str) -> None:
        print(HELP.format(policies=", ".join(get_args(_kind_of("gen_remasking")))))
        settings = {f.name: getattr(self.config, f.name) for f in fields(self.config)}
        print("  ".join(f"{name} {value}" for name, value in settings.items()))

    def reset(self, _: str) -> None:
        self.messages = []
        print("(the conversation is forgotten)")

    def steps(self, rest: str) -> None:
        self._set("gen_steps", rest, int)

    def block(self, rest: str) -> None:
        self._set("gen_block_size", rest, int)

    def policy(self, rest: str) -> None:
        choices = get_args(_kind_of("gen_remasking"))
        if self.is_diffusion and rest not in choices:
            raise ValueError(f"/policy {rest}: expected one of {', '.join(choices)}")
        self._set("gen_remasking", rest, str)

    def temperature(self, rest: str) -> None:
        self._set("gen_temp" if self.is_diffusion else "ar_temperature", rest, float)

    def infill(self, rest: str) -> None:
        self._require_diffusion()
        replying = self.messages[:-1] if self.wraps and self.messages else None
        self.asked = rest
        self._show(infill, rest, self.chat.blank_tokens, replying)

    def write_trace(self, rest: str) -> None:
        if self.trace is None:
            raise ValueError("there is no reply yet that could be traced")
        if not rest or rest == "terminal":
            raise ValueError("/trace needs a file name ending in .html, .gif or .json")
        check_trace_path(rest)
        write_trace(Path(rest), [self.trace])
        print(f"saved {rest}")

    def quit(self, _: str) -> None:
        raise Leave

    def _require_diffusion(self) -> None:
        if not self.is_diffusion:
            raise ValueError("this checkpoint is autoregressive; that command is for diffusion")

    def _set(self, name: str, text: str, kind: type) -> None:
        if name.startswith("gen_"):
            self._require_diffusion()
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(f"expected a number, found {text!r}") from None
        self.config = replace(self.config, **{name: value})
        print(f"({name} {value})")


COMMANDS = {
    "/help": Chat.help,
    "/reset": Chat.reset,
    "/steps": Chat.steps,
    "/temp": Chat.temperature,
    "/block": Chat.block,
    "/policy": Chat.policy,
    "/infill": Chat.infill,
    "/trace": Chat.write_trace,
    "/quit": Chat.quit,
}


def _kind_of(field: str):
    return get_type_hints(DenoisingConfig)[field]


def main(argv: list[str] | None = None) -> None:
    chat, checkpoint, prompting, continuation, sampling, denoising, runtime, given = parse_args(
        __doc__,
        ChatConfig,
        CheckpointConfig,
        PromptConfig,
        ContinuationConfig,
        SamplingConfig,
        DenoisingConfig,
        RuntimeConfig,
        argv=argv,
        max_seq_len=512,
    )
    loaded = checkpoint.load(runtime)
    is_diffusion = loaded.model.config.attention != "causal"
    for group, used, kind in (
        (sampling, not is_diffusion, "an autoregressive"),
        (denoising, is_diffusion, "a diffusion"),
    ):
        refuse_idle(given, **dict.fromkeys((f.name for f in fields(group)), (used, f"{kind} checkpoint")))
        refuse_idle(given, **idle_sampling_flags(group))
    refuse_idle(given, blank_tokens=(is_diffusion, "a diffusion checkpoint"))
    config = denoising if is_diffusion else sampling
    talk = Chat(loaded, config, continuation, prompting, chat, runtime, checkpoint.max_seq_len)
    print(f"{checkpoint.checkpoint}, {'diffusion' if is_diffusion else 'autoregressive'}; /help lists the commands")
    if not talk.wraps:
        print("(not fine-tuned on conversations: it goes on with your text, each line for itself)")
    converse(talk)


def converse(talk: Chat) -> None:
    """Read lines until /quit or their end; a mistake is a sentence, and the conversation goes on."""
    while True:
        try:
            talk.answer(input("> " if sys.stdin.isatty() else ""))
        except ValueError as error:
            print(f"error: {error}")
        except KeyboardInterrupt:
            print("\n(stopped; /quit leaves)")
        except (EOFError, Leave):
            break


if __name__ == "__main__":
    run(main)
