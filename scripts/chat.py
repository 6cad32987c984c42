"""Talk to a checkpoint of either kind; a diffusion model's reply is shown while it is denoised.

    uv run python -m scripts.chat --checkpoint weights/diffusion_sft_state_dict.pt

Type /help for the commands. Lines may also come from a file or a pipe.
"""

import contextlib
import math
import re
import sys
import textwrap
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from model.decoding.autoregressive import SamplingConfig
from model.decoding.canvas import Canvas
from model.decoding.decode import ContinuationConfig
from model.decoding.denoiser import DenoisingConfig
from model.decoding.editing import MODES
from model.decoding.remasking import REMASKING
from scripts.engine.cli import parse_args, run
from scripts.engine.decoding.generation import (
    Generation,
    Sampler,
    Watch,
    first_seed,
    generate,
    infill,
    note_on_blanks,
)
from scripts.engine.decoding.trace import RECORD, Trace, Vocabulary
from scripts.engine.decoding.trace_files import SUFFIXES, check_trace_path, write_trace
from scripts.engine.decoding.trace_terminal import LiveView, on_screen
from scripts.engine.decoding.watching import Typing
from scripts.engine.files import require_output
from scripts.engine.flags import in_effect, settings_of, spelling
from scripts.engine.loaded import AnyCheckpointConfig, Loaded, circumstances
from scripts.engine.prompts import (
    Blanks,
    Conversation,
    Prompt,
    TypedPromptConfig,
    fitting,
    note_on_template,
    refuse_long_system,
)
from scripts.engine.runtime import RuntimeConfig, command_line

HELP = """\
/help             this list and the settings
/reset            forget the conversation; the system prompt stays
/system TEXT      change the system prompt, "" for none; the conversation goes on. Without TEXT: show it
/temp T           sampling temperature, 0 = the likeliest token
/trace FILE       write the last reply, step by step, to FILE.html, .gif or .json
/quit             leave (so does Ctrl-D; Ctrl-C stops a reply)
//TEXT            send a line that begins with a slash: /TEXT"""
DIFFUSION_HELP = """\
/steps N          denoising steps of a reply
/block N          tokens denoised together, from left to right; 0 = the whole reply at once
/policy NAME      which predictions a denoising step keeps: {policies}
/mode NAME        draft fast, then edit: {modes}
/edit T           edit where another token is more probable than T; off = what is written stays
/infill TEXT      fill the blanks (___) of TEXT; as a reply to the last message, if there is one; not remembered"""


@dataclass(frozen=True)
class ChatConfig:
    """The conversation."""

    live: Annotated[bool | None, "show a reply while it is written (none: if the output is a terminal)"] = None
    blank_tokens: Annotated[
        int, "tokens in place of each blank of /infill", "at least 1", "with a diffusion checkpoint"
    ] = 8


class Leave(Exception):
    """Raised by /quit."""


class Chat:
    """A conversation with one checkpoint. `answer` takes a line that the user typed and prints the reply or result."""

    def __init__(
        self,
        loaded: Loaded,
        sampler: Sampler,
        continuation: ContinuationConfig,
        prompting: TypedPromptConfig,
        chat: ChatConfig,
        command: str,
    ):
        self.loaded, self.sampler, self.continuation = loaded, sampler, continuation
        self.chat, self.command = chat, command
        self.wraps, self.control = prompting.wraps(loaded), prompting.control_tokens
        self._open_with(prompting)
        self.live = sys.stdout.isatty() if chat.live is None else chat.live
        self.messages: list[dict[str, str]] = []
        self.trace: Trace | None = None
        self.replies = 0

    @property
    def is_diffusion(self) -> bool:
        return isinstance(self.sampler, DenoisingConfig)

    def answer(self, line: str) -> None:
        """Reply to a message, or carry out a command. ValueError, in one sentence, for a mistake; Leave on /quit."""
        name, rest = [*line.split(maxsplit=1), "", ""][:2]
        try:
            if name in SETTINGS:
                self._set(name, rest.strip())
            elif name in COMMANDS:
                COMMANDS[name](self, rest.strip())
            elif name.startswith("/") and not name.startswith("//"):
                raise ValueError(f"{name} is no command; /help lists them, and //{name[1:]} sends it as a message")
            elif name:
                self._reply(line.strip().removeprefix("/"))
        except ValueError as error:
            raise ValueError(FLAG.sub(lambda flag: COMMAND_OF[flag[0]], str(error))) from None

    # -- replies -------------------------------------------------------------------------------------------------------

    def _reply(self, text: str) -> None:
        if not self.wraps:
            self._write(Prompt(text, self.control), text)
            return
        messages = self._recent([*self.messages, {"role": "user", "content": text}], self.continuation.max_new_tokens)
        generation = self._write(Prompt(self.prompting.opened(messages), self.control), text)
        self.messages = [*messages, {"role": "assistant", "content": generation.text}]

    def _recent(self, messages: Conversation, room: int) -> Conversation:
        """The conversation without its oldest exchanges, as many as must go so that it fits, behind the system prompt,
        with `room` more tokens."""
        whole = Prompt(self.prompting.opened(messages), self.control)
        exchanges = (len(whole.content) - len(fitting(self.loaded, whole, room).content)) // 2
        if exchanges == 1:
            print("(the oldest exchange no longer fits and is left out)")
        elif exchanges:
            print(f"(the {exchanges} oldest exchanges no longer fit and are left out)")
        return messages[2 * exchanges :]

    def _write(self, request: Prompt | Blanks, text: str, start: int | None = None) -> Generation:
        """Generate, showing the canvas from `start` on, by default from its first open position, and keep a trace. An
        interrupt leaves everything as it was before."""
        traces: list[Trace] = []
        seed = (first_seed(self.loaded, self.continuation) + self.replies) % 2**32
        continuation = replace(self.continuation, gen_seed=seed)

        def observe(canvas: Canvas) -> Watch:
            about = {"title": f"reply {self.replies + 1}", "prompt": text, "system": request.system}
            info = {**about, **in_effect(self.sampler), "gen_seed": seed}
            traces.append(Trace(Vocabulary(self.loaded.tokenizer), *canvas.text(0), info))
            return self._watch(traces[0], int(canvas.open[0].int().argmax()) if start is None else start)

        write = infill if isinstance(request, Blanks) else generate
        generation = write(self.loaded, request, continuation, self.sampler, observe)
        self.trace, self.replies = traces[0], self.replies + 1
        self._print(generation)
        return generation

    def _watch(self, trace: Trace, start: int) -> Watch:
        """Show a canvas that fills up, or a text that grows; without --live, only record."""
        if not self.live:
            return trace.add
        if self.is_diffusion:
            return LiveView(trace, stream=sys.stdout, start=start)
        return Typing(trace, start, sys.stdout)

    def _print(self, generation: Generation) -> None:
        """Print the text, unless it was typed already, and what it cost."""
        if not self.live:
            print(generation.text)
        else:
            print(on_screen(generation.text) if self.is_diffusion else "")
        empty = "" if generation.text.strip() else "an empty reply, "
        cut = "" if generation.ended else ", no end within --max-new-tokens"
        cost = f"{generation.num_forward_passes} passes, {generation.tokens_per_second:.0f} tokens/s"
        cost += "" if generation.num_edits is None else f", {generation.num_edits} edits"
        print(f"[{empty}{generation.num_tokens} tokens, {cost}{cut}]")

    # -- commands ------------------------------------------------------------------------------------------------------

    def _set(self, command: str, text: str) -> None:
        setting = SETTINGS[command]
        field = setting.diffusion if self.is_diffusion else setting.autoregressive
        if field is None:
            raise ValueError(f"{command} is for diffusion; this checkpoint is autoregressive")
        try:
            value = setting.read(text)
        except ValueError:
            raise ValueError(f"{command} takes {setting.expected}; found {text or 'none'}") from None
        if field == "gen_block_size" and value > self.loaded.max_length:
            limit = f"--max-seq-len {self.loaded.max_length}"
            raise ValueError(f"/block {value} is more than {limit}; 0 is the whole reply at once")
        sampler = replace(self.sampler, **{field: value})
        self.sampler = sampler.fitted(self.loaded.model.config) if self.is_diffusion else sampler
        print(f"({spelling(field)} {value})")

    def help(self, rest: str) -> None:
        _refuse_rest("/help", rest)
        print(HELP)
        if self.is_diffusion:
            print(DIFFUSION_HELP.format(policies=", ".join(REMASKING), modes=" or ".join(MODES)))
        values = settings_of(self.sampler, self.continuation)
        flags = [f"{spelling(name)} {value}" for name, value in values.items() if value is not None]
        print(textwrap.fill(", ".join(flags), 110, break_on_hyphens=False))
        if self.prompting.system:
            self.system("")

    def reset(self, rest: str) -> None:
        _refuse_rest("/reset", rest)
        self.messages = []
        print("(the conversation is forgotten)")

    def system(self, text: str) -> None:
        if text:
            self._open_with(replace(self.prompting, system="" if text == '""' else text))
        system = self.prompting.system
        print(f"(--system {on_screen(system)})" if system else "(no system prompt)")

    def _open_with(self, prompting: TypedPromptConfig) -> None:
        """Open conversations with this system prompt. ValueError if that cannot be."""
        if prompting.wraps(self.loaded):
            room = self.continuation.max_new_tokens, self.loaded.max_length
            refuse_long_system(self.loaded.tokenizer, prompting.prompt("", self.loaded), *room)
        self.prompting = prompting

    def infill(self, text: str) -> None:
        if not self.is_diffusion:
            raise ValueError("/infill is for diffusion; this checkpoint is autoregressive")
        blanks = Blanks(text, self.chat.blank_tokens, control=self.control)
        row, _ = blanks.encode(self.loaded.tokenizer)
        if self.wraps and self.messages:
            recent = self._recent(self.messages[:-1], len(row) - 1)
            blanks = replace(blanks, conversation=self.prompting.opened(recent))
        if note := note_on_blanks(self.loaded):
            print(f"({note})")
        _, start = blanks.encode(self.loaded.tokenizer)
        self._write(blanks, text, start)

    def write_trace(self, place: str) -> None:
        if self.trace is None:
            raise ValueError("there is no reply yet that could be traced")
        path = Path(place)
        if path.suffix not in SUFFIXES:
            raise ValueError(f"/trace takes a file name ending in {', '.join(SUFFIXES)}; found {place or 'none'}")
        check_trace_path(path)
        tokenizer = self.loaded.tokenizer
        require_output(path, "/trace", self.loaded.path, tokenizer.name_or_path)
        asked = replace(self.prompting, system=self.trace.info["system"] or "")  # it may have changed since
        configs = asked, self.continuation, self.chat
        self.trace.info[RECORD] = circumstances(
            self.command, self.loaded.runtime, tokenizer, None, [self.loaded], *configs
        )
        write_trace(path, [self.trace])
        print(f"saved {place}")

    def quit(self, rest: str) -> None:
        _refuse_rest("/quit", rest)
        raise Leave


def _refuse_rest(command: str, rest: str) -> None:
    if rest:
        raise ValueError(f"{command} takes nothing more; found {rest}")


COMMANDS = {
    "/help": Chat.help,
    "/reset": Chat.reset,
    "/system": Chat.system,
    "/infill": Chat.infill,
    "/trace": Chat.write_trace,
    "/quit": Chat.quit,
}


class Setting(NamedTuple):
    """A command that changes one setting of the sampler."""

    diffusion: str  # field of DenoisingConfig
    autoregressive: str | None  # field of SamplingConfig
    read: Callable[[str], Any]  # raises ValueError
    expected: str


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


def _one_of(names: Collection[str], text: str) -> str:
    if text not in names:
        raise ValueError
    return text


SETTINGS = {
    "/steps": Setting("gen_steps", None, int, "a whole number such as 32"),
    "/temp": Setting("gen_temp", "ar_temperature", _finite, "a number such as 0.8"),
    "/block": Setting("gen_block_size", None, int, "a whole number such as 32"),
    "/policy": Setting("gen_remasking", None, partial(_one_of, REMASKING), f"one of {', '.join(REMASKING)}"),
    "/mode": Setting("gen_mode", None, partial(_one_of, MODES), " or ".join(MODES)),
    "/edit": Setting("gen_edit_threshold", None, lambda t: None if t == "off" else _finite(t), "a number, or off"),
}
COMMAND_OF = {  # flag -> command, which replaces it in what the model's code says about a mistake
    "--gen-steps": "/steps",
    "--gen-temp": "/temp",
    "--ar-temperature": "/temp",
    "--gen-block-size": "/block",
    "--gen-remasking": "/policy",
    "--gen-edit-threshold": "/edit",
    "--infill": "/infill",
    "--system": "/system",
}
FLAG = re.compile("|".join(COMMAND_OF))


def main(argv: list[str] | None = None) -> None:
    chat, checkpoint, prompting, continuation, sampling, denoising, runtime, given = parse_args(
        __doc__,
        ChatConfig,
        AnyCheckpointConfig,
        TypedPromptConfig,
        ContinuationConfig,
        SamplingConfig,
        DenoisingConfig,
        RuntimeConfig,
        argv=argv,
        needs={SamplingConfig: "with an autoregressive checkpoint", DenoisingConfig: "with a diffusion checkpoint"},
        later=(SamplingConfig, DenoisingConfig),
        max_seq_len=512,
    )
    loaded = checkpoint.load_any(runtime)
    is_diffusion = loaded.kind == "diffusion"
    given.refuse_without({"a diffusion checkpoint": is_diffusion, "an autoregressive checkpoint": not is_diffusion})
    # What waits for another temperature or policy, the conversation may bring into effect.
    given.refuse_idle(replace(sampling, ar_temperature=1.0))
    given.refuse_idle(*(replace(denoising, gen_temp=1.0, gen_remasking=policy) for policy in REMASKING))
    config = denoising.fitted(loaded.model.config) if is_diffusion else sampling
    talk = Chat(loaded, config, continuation, prompting, chat, command_line(__spec__.name, argv))
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
    if hasattr(sys.stdin, "reconfigure"):  # bytes that are no text are kept, to be named
        encoding = sys.stdin.encoding if by_hand else "utf-8-sig"
        sys.stdin.reconfigure(encoding=encoding, errors="surrogateescape")
    number = 0
    while True:
        line = None
        try:
            line = input("> " if by_hand else "")
            number += 1
            refuse_no_message(line, number, talk.loaded)
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


def refuse_no_message(line: str, number: int, loaded: Loaded) -> None:
    """Raise ValueError for a line with a byte that no text has (NUL, or not UTF-8), or for one too long to look at."""
    if match := re.search("[\0\udc80-\udcff]", line):  # `surrogateescape` makes the latter of bytes
        before, (byte,) = line[: match.start()], match[0].encode("utf-8", "surrogateescape")
        place = f"byte 0x{byte:02x} at byte offset {len(before.encode('utf-8', 'surrogateescape'))}"
        raise ValueError(f"line {number} is not UTF-8 text ({place}) and was not sent; save the input as UTF-8")
    # Tokenising it would take gigabytes: no token has more characters than its name.
    if len(line) > loaded.max_length * max(map(len, loaded.tokenizer.get_vocab())):
        size = f"{len(line):,} characters, more than --max-seq-len {loaded.max_length} tokens can hold"
        raise ValueError(f"line {number} has {size}, and was not sent; shorten it")


if __name__ == "__main__":
    run(main)
