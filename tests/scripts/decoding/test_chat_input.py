"""scripts.chat: lines that are no commands, input that is no text, and the system prompt."""

import pytest

from dataset.tokenizer import encode
from scripts import chat
from scripts.engine.decoding.trace_files import load_traces
from scripts.engine.prompts import Blanks
from tests.scripts.decoding.conftest import history
from tests.scripts.models import given_tokens

SYSTEM = "the river follows my old friend."


# -- lines -------------------------------------------------------------------------------------------------------------


def test_a_line_behind_a_second_slash_is_sent_with_one(talk, decoding, tokenizer):
    out = talk("ar", ["//help", "/reset", "  //  the cat", "/reset", "///", "/home/cat is"])
    sent = ["/help", "/  the cat", "//"]
    assert decoding.prompts() == [history(tokenizer, text) for text in sent]
    assert "error: /home/cat is no command; /help lists them, and //home/cat sends it as a message" in out
    assert "/reset   " not in out, "nothing has listed the commands"


def test_input_that_is_not_utf8_is_named_line_by_line_and_not_sent(talk, decoding, tokenizer):
    lines = b"the cat\ncaf\xe9 sees\n\xff\xfe\n/infill a\x80___\nthe \0 river\nwhy"
    out = talk("dm", lines)
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    for number, (error, byte, offset) in enumerate(
        zip(errors, ("0xe9", "0xff", "0x80", "0x00"), (3, 0, 9, 4), strict=True), start=2
    ):
        assert f"line {number} " in error and f"byte {byte} at byte offset {offset})" in error
    assert decoding.prompts() == [
        history(tokenizer, "the cat"),
        history(tokenizer, "the cat", decoding.replies[0], "why"),
    ]
    assert "\ufffd" not in out.replace(decoding.replies[0], "").replace(decoding.replies[1], "")


def test_a_byte_order_mark_and_foreign_line_ends_are_no_part_of_a_message(talk, decoding, tokenizer):
    talk("ar", "\ufeff老朋友\r\n/reset\r\nthe \ufeffcat\r\n".encode())
    assert decoding.prompts() == [history(tokenizer, text) for text in ("老朋友", "the \ufeffcat")]


def test_a_line_that_no_context_holds_is_refused_without_tokenising_it(talk, decoding, monkeypatch, tokenizer):
    longest = max(map(len, tokenizer.get_vocab()))
    limits = "--seq-len", "60"
    out = talk("ar", ["a" * (60 * longest + 1), "a" * 60 * longest, "why"], *limits)
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert f"line 1 has {60 * longest + 1:,} characters" in errors[0] and "the prompt's " in errors[1]
    assert decoding.prompts() == [history(tokenizer, "why")]


# -- the system prompt -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("ar", "dm"))
def test_the_system_prompt_opens_every_conversation(kind, talk, decoding, tokenizer):
    lines = ["the cat", "why", "/reset", "the cat", "/system 老朋友", "why", '/system ""', "why", "/system"]
    out = talk(kind, lines, "--system", SYSTEM)
    replies = decoding.replies
    assert decoding.prompts() == [
        history(tokenizer, "the cat", system=SYSTEM),
        history(tokenizer, "the cat", replies[0], "why", system=SYSTEM),
        history(tokenizer, "the cat", system=SYSTEM),
        history(tokenizer, "the cat", replies[2], "why", system="老朋友"),
        history(tokenizer, "the cat", replies[2], "why", replies[3], "why"),
    ]
    assert out.count("(no system prompt)") == 2 and out.count("老朋友)") == 1


def test_the_system_prompt_stays_when_exchanges_are_left_out(talk, decoding, tokenizer):
    asked = ["the cat sees the river"] * 5
    limit = 2 * (len(history(tokenizer, asked[0])) + 6) + len(history(tokenizer, asked[0], system=SYSTEM))
    out = talk("dm", [*asked, "/infill ___"], "--seq-len", str(limit), "--system", SYSTEM, "--blank-tokens", "20")
    turns, left_out = [], 0
    for text, reply, prompt in zip(asked, decoding.replies, decoding.prompts(), strict=False):
        turns.append(text)
        while len(history(tokenizer, *turns, system=SYSTEM)) + 6 > limit:
            turns, left_out = turns[2:], left_out + 1
        assert prompt == history(tokenizer, *turns, system=SYSTEM)
        turns.append(reply)
    assert left_out > 1 and "left out)" in out
    asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": asked[0]}]
    assert given_tokens(decoding.canvases[-1]) == Blanks("___", 20, asked).encode(tokenizer)[0]


def test_a_system_prompt_that_leaves_no_room_is_refused_and_the_old_one_stays(
    talk, decoding, tokenizer, flags, refused
):
    limit = len(history(tokenizer, "", system=SYSTEM)) + 6
    short = [*flags("ar"), "--seq-len", str(limit - 1)]
    refused(chat, [*short, "--system", SYSTEM], "--system", f"--max-seq-len {limit - 1}")
    refused(chat, [*short, "--system", "a", "--no-chat-wrap"], "--system has no effect outside the chat template")
    out = talk("ar", [f"/system {SYSTEM * 2}", f"/system {SYSTEM}", "a" * 40], "--seq-len", str(limit), "--system", "a")
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    assert "/system" in errors[0] and "the prompt's " in errors[1] and len(errors) == 2 and not decoding.canvases
    out = talk("ar", ["/system a", "why"], "--no-chat-wrap")
    assert "error: /system has no effect outside the chat template" in out
    assert decoding.prompts() == [[tokenizer.bos_token_id, *encode(tokenizer, "why")]]


def test_a_trace_tells_the_system_prompt_of_its_reply(talk):
    talk("dm", ["the cat", "/system other", "/trace a.json"], "--system", SYSTEM)
    (trace,) = load_traces("a.json")
    assert trace.info["system"] == trace.info["record"]["settings"]["system"] == SYSTEM
