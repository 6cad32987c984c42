"""scripts.chat: what the model is given, what each command changes, and what a mistake or an interrupt leaves alone."""

import contextlib
import io
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.tokenizer import decode, encode
from model.config import ModelConfig
from model.decoding.autoregressive import SamplingConfig
from model.decoding.canvas import DecodingStep
from model.decoding.denoiser import DenoisingConfig
from scripts import chat
from scripts.engine.decoding.trace import REPLACEMENT, Trace, Vocabulary
from scripts.engine.decoding.trace_files import load_traces
from scripts.engine.decoding.trace_terminal import on_screen
from scripts.engine.decoding.watching import Typing
from scripts.engine.prompts import Blanks
from tests.scripts.decoding.conftest import history
from tests.scripts.models import Terminal, given_tokens

KINDS = ("ar", "dm")


class Impatient(Terminal):
    """A keyboard on which Ctrl-C is pressed before the first line."""

    def readline(self, *more):
        if not self.tell():
            self.seek(1)
            raise KeyboardInterrupt
        return super().readline(*more)


def fitted(**settings):
    """As a checkpoint of full attention is decoded."""
    return DenoisingConfig(**settings).fitted(ModelConfig(attention="full"))


# -- the conversation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_question_is_given_with_all_before_it_in_the_chat_template(kind, talk, decoding, tokenizer):
    out = talk(kind, ["the cat sees", "", "  老朋友  ", "/reset", "the river"])
    first, second, _ = decoding.replies
    assert decoding.prompts() == [
        history(tokenizer, "the cat sees"),
        history(tokenizer, "the cat sees", first, "老朋友"),
        history(tokenizer, "the river"),
    ]
    assert all(reply in out for reply in decoding.replies) and "(the conversation is forgotten)" in out
    assert decoding.seeds == [1337, 1338, 1339]
    assert all(int(canvas.open.sum()) == 6 for canvas in decoding.canvases)


@pytest.mark.parametrize("kind", KINDS)
def test_the_oldest_exchanges_are_forgotten_aloud_when_the_context_is_full(kind, talk, decoding, tokenizer):
    asked = ["the cat sees the river"] * 6
    size = len(history(tokenizer, asked[0])) + 6
    limit = 3 * size + 10
    out = talk(kind, asked, "--seq-len", str(limit))
    turns, left_out = [], 0
    for text, reply, prompt in zip(asked, decoding.replies, decoding.prompts(), strict=True):
        turns.append(text)
        while len(history(tokenizer, *turns)) + 6 > limit:
            turns, left_out = turns[2:], left_out + 1
        assert prompt == history(tokenizer, *turns)
        turns.append(reply)
    assert left_out > 0 and out.count("left out)") >= 1


def test_a_question_too_long_for_the_context_changes_nothing(talk, decoding, tokenizer):
    out = talk("ar", ["the cat", "the river " * 40, "why"], "--seq-len", "60")
    assert out.count("error: ") == 1 and "exceed --max-seq-len 60" in out
    assert decoding.prompts()[1] == history(tokenizer, "the cat", decoding.replies[0], "why")


def test_an_empty_reply_is_named_and_remembered(talk, decoding, tokenizer):
    decoding.empty = 0
    out = talk("dm", ["the cat", "why"])
    assert "[an empty reply, 1 tokens" in out
    assert decoding.prompts()[1] == history(tokenizer, "the cat", "", "why")


@pytest.mark.parametrize("more, chats", [(["--no-chat-wrap"], True), ([], False)])
def test_outside_the_template_every_line_is_continued_for_itself(more, chats, talk, decoding, tokenizer):
    out = talk("ar", ["the cat", "the river"], *more, chats=chats)
    assert decoding.prompts() == [[tokenizer.bos_token_id, *encode(tokenizer, t)] for t in ("the cat", "the river")]
    assert "outside the chat template" in out
    assert ("was not trained on conversations" in out) != chats


# -- commands ----------------------------------------------------------------------------------------------------------


def test_a_command_changes_the_next_reply(talk, decoding):
    out = talk(
        "dm",
        ["a", "/steps 3", "/temp\t0", "a", "/block\u3000 4 ", "/policy left_to_right", "a", "/help"],
        "--gen-steps",
        "2",
    )
    assert decoding.configs == [
        fitted(gen_steps=2),
        fitted(gen_steps=3, gen_temp=0.0),
        fitted(gen_steps=3, gen_temp=0.0, gen_block_size=4, gen_remasking="left_to_right"),
    ]
    for shown in ("--gen-steps 3", "--gen-remasking left_to_right", "--max-new-tokens 6", *chat.COMMANDS):
        assert shown in out


def test_editing_is_set_by_mode_or_by_threshold_and_taken_back(talk, decoding):
    talk("dm", ["/mode speed", "a", "/edit off", "a", "/edit 0.25", "a"])
    speed = fitted(gen_mode="speed")
    assert decoding.configs == [speed, *(replace(speed, gen_edit_threshold=value) for value in (None, 0.25))]


def test_an_autoregressive_checkpoint_has_a_temperature_and_nothing_of_diffusion(talk, decoding):
    refused = ["/steps 3", "/block 4", "/policy random", "/infill a___"]
    out = talk("ar", ["/temp 0.5", "a", *refused, "/help"])
    assert decoding.configs == [SamplingConfig(ar_temperature=0.5)]
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert [error.split()[1] for error in errors] == [line.split()[0] for line in refused]
    assert all("this checkpoint is autoregressive" in error for error in errors)
    assert "/temp T" in out and "/steps N" not in out


NONSENSE = {
    "/steps": "/steps takes a whole number such as 32; found none",
    "/steps x": "found x",
    "/steps 2.5": "whole number",
    "/steps 0": "/steps must be at least 1, not 0",
    "/temp": "/temp takes a number such as 0.8; found none",
    "/temp warm": "found warm",
    "/temp nan": "found nan",
    "/temp inf": "found inf",
    "/temp -1": "/temp must be at least 0, not -1",
    "/block -1": "/block must be in [0, 2^31), not -1",
    "/block 99999999999999999999999": "more than --max-seq-len 60",
    "/policy": "/policy takes one of low_confidence, random",
    "/policy best": "found best",
    "/mode fast": "/mode takes quality or speed; found fast",
    "/edit": "/edit takes a number, or off; found none",
    "/edit 2": "/edit must be in [0, 1], not 2",
    "/infill": "/infill has no blank: write ___",
    "/infill no blank": "/infill has no blank",
    "/infill ___" + " the river" * 40: "the text with its blanks is",
    "/trace": "/trace takes a file name ending in .html, .gif, .json; found none",
    "/trace terminal": "found terminal",
    "/trace a.txt": "found a.txt",
    "/trace nowhere/a.html": "no folder nowhere",
    "/reset all": "/reset takes nothing more",
    "/quit now": "/quit takes nothing more",
    "/help me": "/help takes nothing more",
    "/leave": "/leave is no command; /help lists them",
    "/": "/ is no command",
}


def test_nonsense_is_answered_with_one_sentence_and_changes_nothing(talk, decoding, tokenizer):
    out = talk("dm", ["the cat", *NONSENSE, "why"], "--seq-len", "60")
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    for (line, words), error in zip(NONSENSE.items(), errors, strict=True):
        assert words in error, (line, error)
    assert decoding.configs == [fitted()] * 2
    assert decoding.prompts()[1] == history(tokenizer, "the cat", decoding.replies[0], "why")


def test_a_checkpoint_of_blocks_keeps_to_them(flags, monkeypatch, command, decoding):
    """And says where that makes a difference to the blanks of a text."""
    argv = flags("dm", attention="block", block_size=3)
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat\n/block 4\n/steps 2\n/infill my ___ friend\n"))
    out = command(chat, argv).out
    assert "diffusion in blocks of 3 tokens; /help" in out.splitlines()[0]
    assert "error: /block 4 is not 3, the block size that this checkpoint was trained for" in out
    assert "(blanks are filled in blocks of 3 tokens: " in out
    used = [(c.gen_block_size, c.gen_cache, c.gen_steps) for c in decoding.configs]
    assert used == [(3, "block", 64), (3, "block", 2)]


def test_a_trace_before_the_first_reply_is_refused_in_a_sentence(talk):
    assert "error: there is no reply yet" in talk("ar", ["/trace a.json"])


def test_a_trace_does_not_replace_the_tokenizer_in_use(talk, tokenizer_dir):
    shutil.copytree(tokenizer_dir, "t")
    out = talk("ar", ["the cat", "/trace t/tokenizer.json"], "--tokenizer-dir", "t")
    assert "error: /trace t/tokenizer.json is a file that the command reads" in out
    assert Path("t/tokenizer.json").read_bytes() == (tokenizer_dir / "tokenizer.json").read_bytes()


def test_a_reply_that_did_not_end_is_marked_and_nothing_after_quit_is_read(talk, decoding):
    out = talk("dm", ["the cat", "/quit", "the river"], "--gen-eos", "never")
    assert "no end within --max-new-tokens" in out and len(decoding.canvases) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_trace_is_that_of_the_last_reply(kind, talk, decoding, tokenizer):
    decoding.interrupted = 2
    talk(kind, ["the cat", "the river", "/trace a.json", "/trace a.html", "my friend", "/trace b.json"])
    (trace,) = load_traces("a.json")
    assert load_traces("b.json") == [trace], "an interrupted reply is none"
    assert trace.info["prompt"] == "the river"
    head = history(tokenizer, "the cat", decoding.replies[0], "the river")
    assert trace.ids[: len(head)] == head
    written = decode(tokenizer, trace.ids[len(head) :])
    assert written.startswith(decoding.replies[1])


def test_blanks_are_filled_as_a_reply_to_the_last_message_and_not_remembered(talk, decoding, tokenizer):
    text = "从前有___,最后____。"
    out = talk("dm", [f"/infill {text}", "the cat", f"/infill {text}", "why"], "--blank-tokens", "3")
    alone, _ = Blanks(text, 3).encode(tokenizer)
    replying, _ = Blanks(text, 3, [{"role": "user", "content": "the cat"}]).encode(tokenizer)
    for number, row in ((0, alone), (2, replying)):
        canvas = decoding.canvases[number]
        assert given_tokens(canvas) == row
    assert decoding.prompts()[3] == history(tokenizer, "the cat", decoding.replies[1], "why")
    assert out.count("从前有") == 2


def test_blanks_too_leave_out_what_no_longer_fits(talk, decoding, tokenizer):
    """Here all of the conversation would fit, were it not for the blanks."""
    asked = "the cat sees the river"
    size = len(history(tokenizer, asked))
    blanks = size + 40
    limit = size + blanks + 1
    out = talk("dm", [asked, asked, "/infill ___"], "--seq-len", str(limit), "--blank-tokens", str(blanks))
    assert decoding.prompts() == [
        history(tokenizer, asked),
        history(tokenizer, asked, decoding.replies[0], asked),
        history(tokenizer, asked),
    ]
    assert "error" not in out and out.count("(the oldest exchange no longer fits and is left out)") == 1


@pytest.mark.parametrize(
    "kind, more, words",
    [
        ("ar", ["--gen-steps", "4"], "--gen-steps has no effect without a diffusion checkpoint"),
        ("dm", ["--ar-top-k", "4"], "--ar-top-k has no effect without an autoregressive checkpoint"),
        ("dm", ["--gen-repeat-penalty", "0", "--gen-repeat-window", "4"], "--gen-repeat-window"),
        ("dm", ["--checkpoint", "nowhere.pt"], "nowhere.pt"),
    ],
)
def test_a_flag_that_no_command_can_bring_into_effect_is_refused(kind, more, words, flags, refused):
    refused(chat, [*flags(kind), *more], words)


def test_a_flag_that_waits_for_a_command_is_kept(talk, decoding):
    more = ("--gen-temp", "0", "--gen-top-k", "4", "--gen-confidence-threshold", "0.1")
    talk("dm", ["/policy threshold", "/temp 1", "a"], *more)
    expected = fitted(gen_temp=1.0, gen_top_k=4, gen_confidence_threshold=0.1, gen_remasking="threshold")
    assert decoding.configs == [expected]


# -- interrupts and terminals ------------------------------------------------------------------------------------------


def by_hand(flags, monkeypatch, keyboard, more=()):
    """What stands on the terminal after a chat with this keyboard."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stdin", keyboard)
    with contextlib.redirect_stdout(screen):
        chat.main([*flags, *more])
    return screen.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupt_stops_the_reply_and_keeps_the_conversation(kind, talk, decoding, tokenizer):
    decoding.interrupted = 1
    out = talk(kind, ["the cat", "the river", "why"], *(("--gen-steps", "6") if kind == "dm" else ()))
    assert out.count("(stopped; the conversation is as it was before)") == 1
    assert decoding.prompts()[2] == history(tokenizer, "the cat", decoding.replies[0], "why")
    assert decoding.seeds == [1337, 1338, 1338]


def test_ctrl_c_at_the_prompt_says_how_to_leave_and_ctrl_d_leaves_on_a_line_of_its_own(flags, monkeypatch):
    screen = by_hand(flags("ar"), monkeypatch, Impatient(" /help\n"))
    assert screen.count("(/quit leaves)") == 1 and "/reset" in screen
    assert screen.endswith("> \n")


def test_a_terminal_sees_the_canvas_fill_up(flags, monkeypatch, decoding):
    screen = by_hand(flags("dm"), monkeypatch, Terminal("the cat\n"), ["--gen-steps", "3"])
    assert screen.count("forward passes, ") == 3 and "\033[" in screen
    plain = by_hand(flags("dm"), monkeypatch, Terminal("the cat\n"), ["--gen-steps", "3", "--no-live"])
    assert "\033" not in plain and decoding.replies[0] == decoding.replies[1]
    assert decoding.replies[1] in plain and on_screen(decoding.replies[0]) in screen


def test_an_infilled_text_is_shown_from_its_beginning(talk):
    out = talk("dm", ["the cat", "/infill my old friend ___ the river"], "--live", "--gen-steps", "2")
    lines = [line for line in out.splitlines() if line.startswith("[step ")]
    assert all("my old friend " in line and line.endswith("the river\u25a0") for line in lines[-2:])
    assert not any("the cat" in line for line in lines)


def test_an_autoregressive_reply_is_typed_once(flags, monkeypatch, decoding):
    screen = by_hand(flags("ar"), monkeypatch, Terminal("the cat\n"), ["--ar-temperature", "0"])
    (reply,) = decoding.replies
    typed = on_screen(reply.rstrip(REPLACEMENT)).replace("\u25cc", "")
    assert typed and screen.replace("\u25cc", "").count(typed) == 1


words = st.text(st.characters(categories=("L", "N", "P", "S", "Zs"), exclude_characters=REPLACEMENT), max_size=8)


@settings(max_examples=60, deadline=None)
@given(text=words, prompt=words)
def test_text_is_typed_as_it_grows_and_no_character_is_broken(text, prompt, tokenizer):
    """A token may be a part of a character; at every moment the typed text is a beginning of the whole."""
    head, new = [tokenizer.bos_token_id, *encode(tokenizer, prompt)], encode(tokenizer, text)
    canvas = torch.tensor([[*head, *[tokenizer.mask_token_id] * (len(new) + 1)]])
    trace, stream = Trace(Vocabulary(tokenizer), canvas[0], canvas[0] == tokenizer.mask_token_id), io.StringIO()
    watch = Typing(trace, len(head), stream)
    for i, token in enumerate([*new, tokenizer.eos_token_id]):
        canvas, written = canvas.clone(), torch.zeros_like(canvas, dtype=torch.bool)
        canvas[0, len(head) + i], written[0, len(head) + i] = token, True
        watch(DecodingStep(canvas, written, torch.zeros(canvas.shape), i + 1))
        whole = decode(tokenizer, new[: i + 1]).rstrip(REPLACEMENT)
        assert stream.getvalue() == on_screen(whole)
    assert stream.getvalue() == on_screen(text) and trace.ids == canvas[0].tolist()


def test_what_a_model_writes_steers_no_terminal():
    assert on_screen("a\033[2Jb\r\x07c\nd") == "a\u241b[2Jb\u240d\u2407c\nd"
