"""Talk to a checkpoint of either kind; a diffusion model's reply is shown while it is denoised.

    uv run python -m scripts.chat --checkpoint weights/diffusion_sft_state_dict.pt

Type /help for the commands. Lines may also come from a file or a pipe.
"""

import contextlib
import math
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from model.canvas import Canvas
from model.decode import ContinuationConfig, DenoisingConfig, SamplingConfig
from scripts.engine.cli import parse_args, refuse_idle, run
from scripts.engine.decoding.generation import (
    Generation,
    generate,
    idle_sampling_flags,
    in_effect,
    infill,
    note_on_blanks,
)
from scripts.engine.decoding.trace import RECORD, Trace, Vocabulary
from scripts.engine.decoding.trace_files import SUFFIXES, check_trace_path, write_trace
from scripts.engine.decoding.trace_terminal import LiveView, on_screen
from scripts.engine.decoding.watching import Typing, Watch
from scripts.engine.files import require_output
from scripts.engine.flags import settings_of
from scripts.engine.loaded import CheckpointConfig, Loaded, circumstances
from scripts.engine.prompts import Blanks, Conversation, Prompt, TypedPromptConfig, note_on_template, prompt_tokens
from scripts.engine.runtime import RuntimeConfig, command_line

HELP = """\
/help             this list and the settings
/reset            forget the conversation
/temp T           sampling temperature, 0 = the likeliest token
/trace FILE       write the last reply, step by step, to FILE.html, .gif or .json
/quit             leave (so does Ctrl-D; Ctrl-C stops a reply)"""
DIFFUSION_HELP = """\
/steps N          denoising steps of a reply
/block N          tokens denoised together, from left to right; 0 = the whole reply at once
/policy NAME      which predictions a denoising step keeps: {policies}
/infill TEXT      fill the blanks (___) of TEXT; as a reply to the last message, if there is one; not remembered"""


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
        prompting: TypedPromptConfig,
        chat: ChatConfig,
        runtime: RuntimeConfig,
        max_length: int,
        command: str,
    ):
        self.loaded, self.config, self.continuation, self.runtime = loaded, config, continuation, runtime
        self.chat, self.max_length, self.command = chat, max_length, command
        self.wraps, self.control = prompting.wraps(loaded), prompting.control_tokens
        self.live = sys.stdout.isatty() if chat.live is None else chat.live
        self.messages: list[dict[str, str]] = []
        self.trace: Trace | None = None
        self.replies = 0

    @property
    def is_diffusion(self) -> bool:
        return isinstance(self.config, DenoisingConfig)

    def answer(self, line: str) -> None:
        """ValueError, in one sentence, for what cannot be done; Leave on /quit."""
        line = line.strip()
        if not line.startswith("/"):
            if line:
                self._reply(line)
            return
        name, rest = [*line.split(maxsplit=1), ""][:2]
        if name not in COMMANDS:
            raise ValueError(f"{name} is no command; /help lists them")
        COMMANDS[name](self, rest)

    # -- replies ---------------------------------------------------------------------------------------------------

    def _reply(self, text: str) -> None:
        if not self.wraps:
            self._show(Prompt(text, self.control), text)
            return
        asked = [*self.messages, {"role": "user", "content": text}]
        messages = self._within_reach(asked, self.continuation.max_new_tokens)
        made = self._show(Prompt(messages, self.control), text)
        self.messages = [*messages, {"role": "assistant", "content": made.text}]

    def _within_reach(self, messages: Conversation, room: int) -> Conversation:
        """The conversation without as many of its oldest exchanges as must go to leave room for so many tokens."""
        for dropped in range(0, len(messages), 2):
            with contextlib.suppress(ValueError):
                prompt_tokens(self.loaded.tokenizer, Prompt(messages[dropped:], self.control), room, self.max_length)
                if dropped == 2:
                    print("(the oldest exchange no longer fits and is left out)")
                elif dropped:
                    print(f"(the {dropped // 2} oldest exchanges no longer fit and are left out)")
                return messages[dropped:]
        return messages[-1:]  # which is refused by whoever puts it to the model

    def _show(self, request: Prompt | Blanks, asked: str, start: int | None = None) -> Generation:
        """Write what is requested, showing the canvas from `start` on, or from its first open position, and keeping a
        trace. If it is interrupted, all is as it was before."""
        traces: list[Trace] = []
        first = self.runtime.seed if self.continuation.gen_seed is None else self.continuation.gen_seed
        continuation = replace(self.continuation, gen_seed=(first + self.replies) % 2**32)

        def observe(canvas: Canvas) -> Watch:
            info = {"title": f"reply {self.replies + 1}", "prompt": asked, **in_effect(self.config)}
            info["gen_seed"] = continuation.gen_seed
            traces.append(Trace(Vocabulary(self.loaded.tokenizer), canvas.ids[0], canvas.open[0], info))
            return self._watch(traces[0], int(canvas.open[0].int().argmax()) if start is None else start)

        write = infill if isinstance(request, Blanks) else generate
        made = write(self.loaded, request, continuation, self.config, observe)
        self.trace, self.replies = traces[0], self.replies + 1
        if self.live:
            print("" if not self.is_diffusion else on_screen(made.text))
        else:
            print(made.text)
        said = "" if made.text.strip() else "an empty reply, "
        cut = "" if made.ended else ", no end within --max-new-tokens"
        speed = f"{made.tokens_per_second:.0f} tokens/s"
        print(f"[{said}{made.num_tokens} tokens, {made.num_forward_passes} passes, {speed}{cut}]")
        return made

    def _watch(self, trace: Trace, start: int) -> Watch:
        """A canvas that fills up, a text that grows, or nothing but the record."""
        if not self.live:
            return trace.add
        if self.is_diffusion:
            return LiveView(trace, stream=sys.stdout, start=start)
        return Typing(trace, start, sys.stdout)

    # -- commands --------------------------------------------------------------------------------------------------

    def help(self, rest: str) -> None:
        _refuse_more("/help", rest)
        print(HELP)
        if self.is_diffusion:
            print(DIFFUSION_HELP.format(policies=", ".join(POLICY_NAMES)))
        values = settings_of(self.config, self.continuation)
        shown = [f"{_flag(name)} {value}" for name, value in values.items() if value is not None]
        print(textwrap.fill(", ".join(shown), 110, break_on_hyphens=False))

    def reset(self, rest: str) -> None:
        _refuse_more("/reset", rest)
        self.messages = []
        print("(the conversation is forgotten)")

    def steps(self, rest: str) -> None:
        self._set("/steps", "gen_steps", _whole_number("/steps", rest))

    def block(self, rest: str) -> None:
        size = _whole_number("/block", rest)
        if size > self.max_length:
            raise ValueError(
                f"/block {size} is more than --max-seq-len {self.max_length}; 0 is the whole reply at once"
            )
        self._set("/block", "gen_block_size", size)

    def policy(self, rest: str) -> None:
        self._require_diffusion("/policy")
        if rest not in POLICY_NAMES:
            found = f"found {rest}" if rest else "found none"
            raise ValueError(f"/policy takes one of {', '.join(POLICY_NAMES)}; {found}")
        self._set("/policy", "gen_remasking", rest)

    def temperature(self, rest: str) -> None:
        try:
            value = float(rest)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"/temp takes a number such as 0.8; found {rest or 'none'}")
        self._set("/temp", "gen_temp" if self.is_diffusion else "ar_temperature", value)

    def infill(self, rest: str) -> None:
        self._require_diffusion("/infill")
        replying = None
        with _named_as("--infill", "/infill"):
            blanks = Blanks(rest, self.chat.blank_tokens, None, self.control)
            row, _ = blanks.encode(self.loaded.tokenizer)
        if self.wraps and self.messages:
            replying = self._within_reach(self.messages[:-1], len(row) - 1)
        if note := note_on_blanks(self.loaded):
            print(f"({note})")
        blanks = replace(blanks, conversation=replying)
        _, start = blanks.encode(self.loaded.tokenizer)
        self._show(blanks, rest, start)

    def write_trace(self, rest: str) -> None:
        if self.trace is None:
            raise ValueError("there is no reply yet that could be traced")
        if Path(rest).suffix not in SUFFIXES:
            raise ValueError(f"/trace takes a file name ending in {', '.join(SUFFIXES)}; found {rest or 'none'}")
        check_trace_path(rest)
        tokenizer = self.loaded.tokenizer
        require_output(Path(rest), "/trace", self.loaded.path, tokenizer.name_or_path)
        about = self.command, self.runtime, tokenizer, None, [self.loaded], self.continuation, self.chat
        self.trace.info[RECORD] = circumstances(*about)
        write_trace(Path(rest), [self.trace])
        print(f"saved {rest}")

    def quit(self, rest: str) -> None:
        _refuse_more("/quit", rest)
        raise Leave

    def _require_diffusion(self, command: str) -> None:
        if not self.is_diffusion:
            raise ValueError(f"{command} is for diffusion; this checkpoint is autoregressive")

    def _set(self, command: str, name: str, value: Any) -> None:
        if name.startswith("gen_"):
            self._require_diffusion(command)
        with _named_as(_flag(name), command):
            config = replace(self.config, **{name: value})
            self.config = config.fitted(self.loaded.model.config) if self.is_diffusion else config
        print(f"({_flag(name)} {value})")


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
POLICY_NAMES = get_args(get_type_hints(DenoisingConfig)["gen_remasking"])


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@contextlib.contextmanager
def _named_as(flag: str, command: str) -> Iterator[None]:
    """Within it a ValueError that names the flag names the command."""
    try:
        yield
    except ValueError as error:
        raise ValueError(str(error).replace(flag, command)) from None


def _refuse_more(command: str, rest: str) -> None:
    if rest:
        raise ValueError(f"{command} takes nothing more; found {rest}")


def _whole_number(command: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{command} takes a whole number such as 32; found {text or 'none'}") from None


def main(argv: list[str] | None = None) -> None:
    chat, checkpoint, prompting, continuation, sampling, denoising, runtime, given = parse_args(
        __doc__,
        ChatConfig,
        CheckpointConfig,
        TypedPromptConfig,
        ContinuationConfig,
        SamplingConfig,
        DenoisingConfig,
        RuntimeConfig,
        argv=argv,
        max_seq_len=512,
    )
    loaded = checkpoint.load(runtime)
    is_diffusion = loaded.kind == "diffusion"
    for group, used, kind in (
        (sampling, not is_diffusion, "an autoregressive"),
        (denoising, is_diffusion, "a diffusion"),
    ):
        refuse_idle(given, **dict.fromkeys((f.name for f in fields(group)), (used, f"{kind} checkpoint")))
        # What waits for another temperature or policy, the conversation may bring into effect.
        idle = idle_sampling_flags(group)
        refuse_idle(given, **{name: idle[name] for name in idle if name.endswith("repeat_window")})
    refuse_idle(given, blank_tokens=(is_diffusion, "a diffusion checkpoint"))
    config = denoising.fitted(loaded.model.config) if is_diffusion else sampling
    settings = config, continuation, prompting, chat, runtime, checkpoint.max_seq_len
    talk = Chat(loaded, *settings, command_line(__spec__.name, argv))
    print(f"{checkpoint.checkpoint}, {loaded.described}; /help lists the commands")
    if note := note_on_template(loaded, talk.wraps):
        print(f"({note})")
    if not talk.wraps:
        print("(outside the chat template: each line is continued for itself, and none is remembered)")
    converse(talk)


def converse(talk: Chat) -> None:
    """Read lines until /quit or their end; a mistake is a sentence, and the conversation goes on."""
    by_hand = sys.stdin.isatty()
    if by_hand:
        with contextlib.suppress(ImportError):  # with it, `input` lets a line be edited and earlier ones come back
            import readline  # noqa: F401
    elif hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    while True:
        line = None
        try:
            line = input("> " if by_hand else "")
            talk.answer(line)
        except Leave:
            break
        except EOFError:
            print(end="\n" if by_hand else "")  # behind the prompt
            break
        except KeyboardInterrupt:
            print("\n(/quit leaves)" if line is None else "\n(stopped; the conversation is as it was before)")
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:
            print(f"error: {error}")
        sys.stdout.flush()  # whoever writes to us through a pipe waits for it


if __name__ == "__main__":
    run(main)
