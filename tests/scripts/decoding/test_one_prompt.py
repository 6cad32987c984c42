"""scripts.eval.eval_sft_one_prompt: one prompt for both models, fair timing, what is printed and what is refused."""

import json

import pytest
from rich.cells import cell_len

from dataset.tokenizer import encode, encode_chat
from scripts.engine.decoding import generation
from scripts.engine.decoding.generation import Generation
from scripts.engine.decoding.trace_files import load_traces
from scripts.eval import eval_sft_one_prompt as one_prompt
from tests.scripts.models import given_tokens

KINDS = {"autoregressive": "ar", "diffusion": "dm"}
PROMPT = "一只小猫 sees the river"


@pytest.fixture
def argv(flag, tokenizer_dir):
    """argv(*kinds): arguments of a run that works."""
    more = ["--tokenizer-dir", str(tokenizer_dir), "--dtype", "float32", "--device", "cpu", "--max-new-tokens", "7"]
    return lambda *kinds: ["--prompt", PROMPT, *[word for kind in kinds or ("ar", "dm") for word in flag(kind)], *more]


@pytest.fixture
def ask(command, argv):
    """ask(kinds, *flags) -> (the JSON object, standard error)."""

    def run(kinds, *flags):
        result = command(one_prompt, [*argv(*kinds), "--json", *flags])
        assert result.code == 0, result.err
        return json.loads(result.out), result.complaints

    return run


def in_template(tokenizer, text):
    return encode_chat(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)


# -- what is measured --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kinds", [("ar",), ("dm",), ("ar", "dm")])
def test_one_object_holds_every_answer_and_what_it_cost(kinds, ask, canvases, tokenizer):
    found, err = ask(kinds)
    assert not err and found["prompt"] == PROMPT and found["chat_wrap"] is True
    assert found["prompt_tokens"] == len(in_template(tokenizer, PROMPT))
    assert [KINDS[kind] for kind in found["answers"]] == list(kinds) and len(canvases) == len(kinds)
    for kind, answer in found["answers"].items():
        assert 1 <= answer["num_tokens"] <= 7
        assert answer["tokens_per_second"] == pytest.approx(answer["num_tokens"] / answer["seconds"])
        assert answer["tokens_per_pass"] == answer["num_tokens"] / answer["num_forward_passes"]
        assert kind == "diffusion" or answer["tokens_per_pass"] == 1
    prefixes = {name.split("_")[0] for name in found["settings"]} & {"ar"}
    assert bool(prefixes) == ("ar" in kinds) and ("gen_steps" in found["settings"]) == ("dm" in kinds)
    assert {"tokenizer", "commit", "device", "torch"} <= found.keys()


def test_an_answer_does_not_depend_on_the_other_model(ask):
    both = ask(("ar", "dm"))[0]["answers"]
    for kind, name in KINDS.items():
        alone = ask((name,))[0]["answers"][kind]
        assert [alone[n] for n in ("text", "num_tokens", "ended", "num_forward_passes")] == [
            both[kind][n] for n in ("text", "num_tokens", "ended", "num_forward_passes")
        ]


@pytest.mark.parametrize("more", [["--chat-wrap"], ["--no-chat-wrap"], []])
def test_both_models_are_given_the_same_full_prompt(more, ask, canvases, tokenizer):
    ask(("ar", "dm"), *more)
    plain = [tokenizer.bos_token_id, *encode(tokenizer, PROMPT)]
    expected = plain if more == ["--no-chat-wrap"] else in_template(tokenizer, PROMPT)
    assert [given_tokens(canvas) for canvas in canvases] == [[*expected, *[None] * 7]] * 2


@pytest.mark.parametrize("more", [[], ["--gen-block-size", "1"], ["--gen-remasking", "threshold"]])
def test_a_few_steps_on_the_same_canvas_warm_a_model_up(more, ask, canvases, monkeypatch):
    """As many passes at the most as there are steps of warming up, all of them before the answer begins."""
    events = []

    decoder_of = generation.decoder_of

    def spied(model, canvas, config, seeds):
        decoder = decoder_of(model, canvas, config, seeds)
        take_step = decoder.step

        def step():
            events.append((tuple(canvas.ids.shape), given_tokens(canvas)))
            return take_step()

        decoder.step = step
        return decoder

    monkeypatch.setattr(generation, "decoder_of", spied)
    generate = one_prompt.generate
    monkeypatch.setattr(one_prompt, "generate", lambda *a: events.append("answer") or generate(*a))
    ask(("ar", "dm"), "--max-new-tokens", "30", *more)
    first = events.index("answer")
    assert events[-1] == "answer" and events.count("answer") == 2
    for steps, canvas in zip((events[:first], events[first + 1 : -1]), canvases, strict=True):
        assert 1 <= len(steps) <= generation.WARM_UP
        assert all(event == (tuple(canvas.ids.shape), given_tokens(canvas)) for event in steps)


def test_the_clock_stands_still_until_the_device_has_done_its_work(ask, monkeypatch):
    events = []
    fill, clock, wait = generation.fill, generation.time.perf_counter, generation._synchronise
    monkeypatch.setattr(generation, "fill", lambda *a: events.append("decode") or fill(*a))
    monkeypatch.setattr(generation, "_synchronise", lambda device: events.append("wait") or wait(device))
    monkeypatch.setattr(generation.time, "perf_counter", lambda: events.append("clock") or clock())
    ask(("dm",))
    assert [event for event in events if event != "clock"] == ["wait", "decode", "wait"]
    assert events[0] == "wait" and events[1] == "clock" and events[-2:] == ["wait", "clock"]


def test_a_checkpoint_of_no_conversations_is_put_the_text_and_said_so(checkpoint, command, argv, canvases, tokenizer):
    flags = argv("dm")
    checkpoint("dm", chats=False)
    result = command(one_prompt, flags)
    assert result.code == 0 and "was not trained on conversations: it goes on with the text" in result.err
    assert given_tokens(canvases[0]) == [tokenizer.bos_token_id, *encode(tokenizer, PROMPT), *[None] * 7]
    result = command(one_prompt, [*flags, "--chat-wrap"])
    assert "the chat template is new to it" in result.err
    assert given_tokens(canvases[1]) == [*in_template(tokenizer, PROMPT), *[None] * 7]


def test_a_block_checkpoint_is_a_diffusion_checkpoint_and_said_to_be_one_of_blocks(argv, checkpoint, command, refused):
    flags = argv()
    checkpoint("dm", attention="block", block_size=3)
    found = json.loads(command(one_prompt, [*flags, "--json"]).out)
    assert [answer["attention"] for answer in found["answers"].values()] == ["causal", "block"]
    assert [answer["block_size"] for answer in found["answers"].values()] == [0, 3]
    assert (found["settings"]["gen_block_size"], found["settings"]["gen_cache"]) == (3, "block")
    said = command(one_prompt, [*flags, "--trace", "a.json"])
    assert "diffusion in blocks of 3 tokens (dm_state_dict.pt)" in " ".join(said.out.split())
    assert load_traces("a.json")[1].info["title"].startswith("diffusion in blocks of 3 tokens: ")
    refused(one_prompt, [*flags, "--gen-block-size", "4"], "--gen-block-size 4 is not 3")


# -- what is shown -----------------------------------------------------------------------------------------------------


def test_the_texts_stand_side_by_side_whatever_their_width(monkeypatch):
    """Every line of the second text begins in the same column; Chinese characters take two."""
    monkeypatch.setenv("COLUMNS", "60")
    left, right = "一只小猫看见了老朋友。" * 4 + "\nthe cat", "XXXX " * 30
    made = {
        kind: Generation("p", text, 10, True, 5, 2.0) for kind, text in (("autoregressive", left), ("diffusion", right))
    }
    lines = one_prompt.report("p", ["autoregressive (ar.pt)", "diffusion (dm.pt)"], made).split("\n")
    assert all(cell_len(line) <= 60 for line in lines if "猫" in line or "XXXX" in line)
    columns = {cell_len(line[: line.index("XXXX")]) for line in lines if "XXXX" in line}
    assert len(columns) == 1
    shown = "".join(line[: line.find("XXXX")] if "XXXX" in line else line for line in lines)
    assert "".join(left.split()) in "".join(shown.split())
    assert lines[-1].split() == ["diffusion", "10", "yes", "5", "2.00", "2.000", "5.0"]


def test_a_text_report_names_prompt_files_and_costs(command, argv):
    result = command(one_prompt, argv())
    assert result.code == 0 and not result.complaints
    lines = result.out.splitlines()
    assert lines[0] == PROMPT and "ar_state_dict.pt" in result.out and "dm_state_dict.pt" in result.out
    assert [line.split()[0] for line in lines[-2:]] == ["autoregressive", "diffusion"]


@pytest.mark.parametrize("kinds", [("ar",), ("ar", "dm")])
def test_a_trace_shows_the_very_answers_that_were_timed(kinds, ask):
    found, err = ask(kinds, "--trace", "a.json")
    assert "saved a.json" in err
    traces = load_traces("a.json")
    assert len(traces) == len(kinds)
    for trace, (kind, answer) in zip(traces, found["answers"].items(), strict=True):
        assert trace.info["title"].startswith(kind) and trace.info["prompt"] == PROMPT
        assert trace.num_forward_passes == answer["num_forward_passes"]
        assert answer["text"] in trace.text


def test_a_live_view_leaves_standard_output_to_the_object(ask):
    found, err = ask(("ar", "dm"), "--trace", "terminal")
    assert len(found["answers"]) == 2
    lines = err.splitlines()
    titles = [i for i, line in enumerate(lines) if line.startswith(("autoregressive: ", "diffusion: "))]
    assert len(titles) == 2 and all(line.startswith("[step ") for i, line in enumerate(lines) if i not in titles)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kinds, more, words",
    [
        (("ar",), ["--max-new-tokens", "600"], "exceed --max-seq-len 512"),
        (("ar", "dm"), ["--seq-len", "14"], "exceed --max-seq-len 14"),
        (("ar",), ["--trace", "a.txt"], "a.txt"),
        (("ar",), ["--trace", "nowhere/a.html"], "nowhere"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused_before_any_work(kinds, more, words, argv, refused, monkeypatch):
    monkeypatch.setattr(one_prompt, "warm_up", lambda *a: pytest.fail("began"))
    refused(one_prompt, [*argv(*kinds), *more], words)


def test_something_to_say_and_someone_to_say_it_to_are_needed(argv, refused, command):
    refused(one_prompt, argv("ar")[2:], "--prompt is missing")
    assert command(one_prompt, ["--prompt", "", *argv("ar")[2:]]).code == 0, "nothing is something to say, too"
    refused(one_prompt, ["--prompt", "a"], "--minimind-checkpoint, --diffusion-checkpoint or both")


def test_checkpoints_that_would_be_put_different_prompts_are_refused(checkpoint, argv, refused, command):
    flags = argv()
    checkpoint("dm", chats=False)
    refused(one_prompt, flags, "dm_state_dict.pt was not trained on conversations", "--no-chat-wrap")
    assert command(one_prompt, [*flags, "--no-chat-wrap"]).code == 0
