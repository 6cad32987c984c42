"""Forms of rows: each gives the same messages and tokens as the plain one, or is refused by name; no text is lost."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataset.preferences import PreferenceData, PreferenceDataset
from dataset.reading.bad_rows import BadRows
from dataset.rows.formats import FORMATS, TEXT_FIELDS, messages_of, read_conversations
from dataset.rows.kinds import kinds_of
from dataset.rows.messages import METADATA
from dataset.rows.messages import TEXT_FIELDS as MESSAGE_TEXT_FIELDS
from dataset.rows.pair_formats import PAIR_FORMATS, PROMPT_FIELDS, is_pair, pair_of, read_pairs
from dataset.sft import SFTData, SFTDataset
from dataset.survey import Survey
from dataset.tokenizer import encode_chat, encode_conversations, render_chat


def said(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def shared(source: str, value: str) -> dict:
    return {"from": source, "value": value}


def exchange(prompt: str, reply: str) -> list[dict]:
    return [said("user", prompt), said("assistant", reply)]


# -- the same conversation in every format -----------------------------------------------------------------------------

LISTS = {
    "plain": exchange,
    "ShareGPT": lambda prompt, reply: [shared("human", prompt), shared("gpt", reply)],
    "ShareGPT by role": lambda prompt, reply: [shared("user", prompt), shared("assistant", reply)],
    "parts": lambda prompt, reply: [
        {"role": role, "content": [{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}]}
        for role, text in (("user", prompt), ("assistant", reply))
    ],
    "nulls": lambda prompt, reply: [{**turn, "tool_calls": None, "weight": None} for turn in exchange(prompt, reply)],
}
FORMS = {  # (prompt, reply) -> row
    **{
        f"{field}, {name}": lambda prompt, reply, field=field, make=make: {field: make(prompt, reply)}
        for field in ("conversations", "messages")
        for name, make in LISTS.items()
    },
    **{
        name: lambda prompt, reply, fields=form.fields: dict(zip(fields, (prompt, reply), strict=True))
        for name, form in FORMATS.items()
        if len(form.fields) == 2
    },
    "conversational prompt and completion": lambda prompt, reply: {
        "prompt": [said("user", prompt)],
        "completion": [said("assistant", reply)],
    },
    "Alpaca with text": lambda prompt, reply: {"instruction": prompt, "input": "", "output": reply, "text": "Below is"},
    "repeated": lambda prompt, reply: {"prompt": prompt, "messages": exchange(prompt, reply)},
}
CONTEXTS = {  # what may stand beside a row, and the messages before its own
    "system": ({"system": "Be brief."}, [said("system", "Be brief.")]),
    "system_prompt": ({"system_prompt": "Be brief.", "system": ""}, [said("system", "Be brief.")]),
    "history of pairs": ({"history": [["q", "r"], ["s", "t"]]}, [*exchange("q", "r"), *exchange("s", "t")]),
    "history of messages": ({"history": [shared("human", "q"), said("assistant", "r")]}, exchange("q", "r")),
    "history as a string": ({"history": '[["q", "r"]]'}, exchange("q", "r")),
    "nothing": ({"system": "", "history": [], "tools": "", "id": "a b", "tags": ["a b"], "score": 4, "n": None}, []),
    "both": (
        {"system": "Be brief.", "history": [["q", "r"]]},
        [said("system", "Be brief."), *exchange("q", "r")],
    ),
}
some_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
searched = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", FORMS)
@searched
@given(some_text, some_text, st.sampled_from(sorted(CONTEXTS)))
def test_every_form_gives_the_same_messages_byte_for_byte(name, prompt, reply, beside):
    fields, before = CONTEXTS[beside]
    assert messages_of(FORMS[name](prompt, reply) | fields) == [*before, *exchange(prompt, reply)]


def test_there_is_a_form_for_every_entry_of_the_table():
    tables = {fields for make in FORMS.values() for fields in [tuple(make("a", "b"))]}
    assert {form.fields for form in FORMATS.values()} <= tables
    assert not [name for name in TEXT_FIELDS | MESSAGE_TEXT_FIELDS if METADATA.fullmatch(name)]


@pytest.mark.parametrize("name", FORMS)
def test_a_field_with_text_is_used_or_named(name):
    """`system` and the like are used; `input` under an instruction, too."""
    own = FORMS[name]("a", "b")
    fields = {*TEXT_FIELDS, "note", "思考"} - {"history", "tools", "functions", "messages", "conversations"}
    for field in fields - own.keys():
        try:
            messages = messages_of(own | {field: "ZEBRA 1"})
        except ValueError as error:
            assert "carries text that is not used" in str(error)
        else:
            assert "ZEBRA 1" in "".join(message["content"] for message in messages)


@pytest.mark.parametrize("field", ["note", "name_of_nothing", *sorted(MESSAGE_TEXT_FIELDS - {"tools", "functions"})])
def test_a_text_in_a_message_is_used_or_named(field):
    message = {"role": "user", "content": "a", field: "ZEBRA 1"}
    if field not in ("role", "content"):
        with pytest.raises(ValueError, match=f'"{field}" carries text that is not used'):
            messages_of({"messages": [message, said("assistant", "b")]})


# -- tools, reasoning and marks ----------------------------------------------------------------------------------------

TOOLS = [{"name": "calc", "parameters": {"e": "名"}}]
TOOLS_PROMPT = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"name": "calc", "parameters": {"e": "名"}}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
CALL = '<tool_call>\n{"name": "calc", "arguments": {"e": "7*8"}}\n</tool_call>'
CALLED = {"name": "calc", "arguments": {"e": "7*8"}}
WITH_TOOLS = [
    said("system", f"Be brief.\n\n{TOOLS_PROMPT}"),
    said("user", "7 * 8?"),
    said("assistant", CALL),
    said("user", "<tool_response>\n56\n</tool_response>"),
    said("assistant", "56."),
]
TOOL_FORMS = {
    "MiniMind": {
        "conversations": [
            {"role": "system", "content": "Be brief.", "tools": json.dumps(TOOLS)},
            said("user", "7 * 8?"),
            {"role": "assistant", "content": "", "tool_calls": json.dumps([CALLED])},
            said("tool", "56"),
            said("assistant", "56."),
        ]
    },
    "OpenAI": {
        "messages": [
            said("developer", "Be brief."),
            said("user", "7 * 8?"),
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c 1", "type": "function", "function": {"name": "calc", "arguments": '{"e": "7*8"}'}}
                ],
            },
            {"role": "tool", "tool_call_id": "c 1", "name": "calc", "content": "56"},
            said("assistant", "56."),
        ],
        "tools": TOOLS,
    },
    "ShareGPT": {
        "conversations": [
            shared("human", "7 * 8?"),
            shared("function_call", json.dumps(CALLED)),
            shared("observation", "56"),
            shared("gpt", "56."),
        ],
        "system": "Be brief.",
        "tools": json.dumps(TOOLS),
    },
}


@pytest.mark.parametrize("name", TOOL_FORMS)
def test_tools_are_written_as_the_chat_template_of_minimind_does(name, small):
    messages = messages_of(TOOL_FORMS[name])
    assert messages == WITH_TOOLS
    ids, replies = encode_conversations(small, [messages])[0]
    learnt = [small.decode(ids[begin:end]) for begin, end in replies]
    assert learnt == [f"{CALL}<|im_end|>", "56.<|im_end|>"], "what the assistant wrote is learnt, and nothing else"


def test_reasoning_calls_and_results_stand_in_the_order_of_the_template():
    turn = {"role": "assistant", "content": "\nSo.", "reasoning_content": "\nHm.\n", "tool_calls": [CALLED, CALLED]}
    messages = messages_of({"messages": [said("user", "?"), turn, said("tool", "a"), said("tool", "b")]})
    assert [message["content"] for message in messages[1:]] == [
        f"<think>\nHm.\n</think>\n\nSo.\n{CALL}\n{CALL}",
        "<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response>",
    ]


@pytest.mark.parametrize("name, value", [("weight", 0), ("loss", False), ("loss_weight", 0.0), ("train", False)])
def test_a_marked_reply_is_shown_and_not_learnt(name, value, small, tmp_path):
    turns = [said("user", "2 + 2?"), said("assistant", "5."), said("user", "Again."), said("assistant", "4.")]
    rows = [{"messages": [turns[0], {**turns[1], name: value}, turns[2], {**turns[3], name: 1}]}]
    if name == "weight":
        rows.append({"messages": [turns[0], {**turns[1], "mask": True}, *turns[2:]]})
    assert [message["content"] for message in messages_of(rows[0])] == [turn["content"] for turn in turns]
    path = written(tmp_path, rows)
    for all_replies in (True, False):
        data = SFTData(path, val_fraction=0, cache_dir=tmp_path / "cache")
        train = SFTDataset(data, small, all_replies, rows_per_step=1).train
        batch = train.batch(np.arange(len(train)))
        assert len(train) == len(rows) and batch["input_ids"].tolist()[0][: len(encode_chat(small, turns, False)) - 1]
        for ids, scored in zip(batch["input_ids"], batch["loss_mask"], strict=True):
            assert small.decode(ids[scored]) == "4.<|im_end|>" and "5." in small.decode(ids)
    assert Survey([path], "chat", small, 64).result["counts"]["only_shown"] == len(rows)


REFUSED = {
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "image_url"),
    "pictures beside": ({"messages": exchange("<image>a", "b"), "images": ["a.png"]}, '"images" carries'),
    "several replies": ({"instruction": "a", "output": ["b", "c"]}, '"output" is an array of strings'),
    "half a weight": ({"messages": [*exchange("a", "b")[:1], {**said("assistant", "b"), "weight": 0.5}]}, "weight"),
    "all marked": ({"messages": [said("user", "a"), {**said("assistant", "b"), "loss": False}]}, "no reply that is"),
    "row marked": ({"prompt": "a", "response": "b", "weight": 0}, '"weight" says that nothing'),
    "bad reply": ({"messages": exchange("a", "b"), "label": False}, '"label" is False'),
    "two systems": ({"messages": [said("system", "a"), *exchange("b", "c")], "system": "d"}, "two different system"),
    "tools that are no JSON": (
        {"messages": exchange("a", "b"), "tools": "calc(e)"},
        '"tools" is a string, but no JSON',
    ),
    "a call that is no JSON": ({"conversations": [shared("function_call", "calc(7)")]}, "call of a tool in message 1"),
    "tools in the middle": (
        {"messages": [said("user", "a"), {**said("system", "b"), "tools": TOOLS}, said("assistant", "c")]},
        "tools stand in two places, or after the first message",
    ),
    "history of words": ({"prompt": "a", "response": "b", "history": ["c", "d"]}, "history: message 1 needs"),
    "choices": ({"question": "a", "choices": ["b", "c"], "answer": "c"}, '"choices" carries text'),
    "columns": ({"question": "2?", "A": "1", "B": "2", "answer": "B"}, '"A" carries text'),
    "rejected": ({"messages": exchange("a", "b"), "rejected_response": "c"}, '"rejected_response" carries text'),
    "half a surrogate pair": ({"messages": exchange("a", "b"), "tools": '["\\ud800"]'}, "half a surrogate pair"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_by_name(name):
    row, words = REFUSED[name]
    with pytest.raises(ValueError) as refused:
        messages_of(row)
    assert words in str(refused.value) and "\n" not in str(refused.value)


# -- pairs -------------------------------------------------------------------------------------------------------------

PAIRS = {  # (prompt, chosen, rejected) -> row
    **{
        f"replies to {field}": lambda prompt, chosen, rejected, field=field: {
            field: [said("user", prompt)] if field in ("messages", "conversations") else prompt,
            "chosen": chosen,
            "rejected": rejected,
        }
        for field in PROMPT_FIELDS
    },
    "two conversations": lambda prompt, chosen, rejected: {
        "chosen": exchange(prompt, chosen),
        "rejected": exchange(prompt, rejected),
    },
    "UltraFeedback": lambda prompt, chosen, rejected: {
        "prompt": prompt,
        "prompt_id": "a b",
        "chosen": exchange(prompt, chosen),
        "rejected": exchange(prompt, rejected),
        "messages": exchange(prompt, chosen),
        "score_chosen": 8.0,
    },
    "TRL": lambda prompt, chosen, rejected: {
        "prompt": [said("user", prompt)],
        "chosen": [said("assistant", chosen)],
        "rejected": [said("assistant", rejected)],
    },
    "ShareGPT": lambda prompt, chosen, rejected: {
        "conversations": [shared("human", prompt)],
        "chosen": shared("gpt", chosen),
        "rejected": shared("gpt", rejected),
    },
    "rejected_response": lambda prompt, chosen, rejected: {
        "messages": exchange(prompt, chosen),
        "rejected_response": rejected,
    },
    "query and rejected_response": lambda prompt, chosen, rejected: {
        "query": prompt,
        "response": chosen,
        "rejected_response": rejected,
    },
    "rejected_messages": lambda prompt, chosen, rejected: {
        "messages": exchange(prompt, chosen),
        "rejected_messages": exchange(prompt, rejected),
    },
    "HH-RLHF": lambda prompt, chosen, rejected: {
        name: f"\n\nHuman: {prompt}\n\nAssistant: {reply}"
        for name, reply in (("chosen", chosen), ("rejected", rejected))
    },
    "HH-RLHF with its prompt": lambda prompt, chosen, rejected: {
        "prompt": f"\n\nHuman: {prompt}\n\nAssistant:",
        "chosen": f" {chosen}",
        "rejected": f" {rejected}",
    },
}


@pytest.mark.parametrize("name", PAIRS)
@searched
@given(some_text, some_text, some_text, st.sampled_from(sorted(CONTEXTS)))
def test_every_form_gives_the_same_pair_byte_for_byte(name, prompt, chosen, rejected, beside):
    fields, before = CONTEXTS[beside]
    row = PAIRS[name](prompt, chosen, rejected) | fields
    assert is_pair(row) and tuple(pair_of(row)) == ([*before, said("user", prompt)], chosen, rejected)


def test_there_is_a_row_for_every_entry_of_the_table_of_pairs():
    rows = [make("a", "b", "c") for make in PAIRS.values()]
    first = [next(name for name, form in PAIR_FORMATS.items() if form.fits(row)) for row in rows]
    assert set(first) == set(PAIR_FORMATS)


@pytest.mark.parametrize("name", PAIRS)
def test_a_text_beside_a_pair_is_named(name):
    with pytest.raises(ValueError, match='"note" carries text'):
        pair_of(PAIRS[name]("a", "b", "c") | {"note": "ZEBRA 1"})


def test_empty_and_equal_replies_are_left_out_and_counted(tmp_path, small):
    rows = [("a", "x", "x"), ("b", "", "y"), ("c", "z", ""), ("d", "", ""), ("e", "good", "bad")]
    path = written(tmp_path, [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows])
    data = PreferenceDataset(PreferenceData(path, val_fraction=0, cache_dir=tmp_path / "cache"), small, "full", 0)
    counts = Survey([path], "pairs", small, 64).result["counts"]
    for meta in (data.meta, counts):
        assert (meta["equal_replies"], meta["empty_replies"]) == (1, 3)
    assert len(data.train) == 1 and "(1 of equal replies left out) (3 of empty replies left out)" in data.describe()


@pytest.mark.parametrize("value, learnt", [("0", False), ("False", False), ("0.0", False), ("1", True), ("TRUE", True)])
def test_marks_of_a_csv_file_are_strings(value, learnt):
    row = {"instruction": "a", "output": "b"}
    for field in ("weight", "loss", "train", "label"):
        if learnt:
            assert messages_of(row | {field: value}) == exchange("a", "b")
        else:
            with pytest.raises(ValueError, match=f'"{field}"'):
                messages_of(row | {field: value})
    with pytest.raises(ValueError, match='"weight" of the row is "half"; expected 0 or 1'):
        messages_of(row | {"weight": "half"})


@pytest.mark.parametrize("field", ["messages", "conversations"])
@searched
@given(some_text, some_text, some_text)
def test_arrays_may_be_strings_of_json_and_absent_ones_empty(field, prompt, reply, other):
    row = {field: json.dumps(LISTS["ShareGPT"](prompt, reply)), "choices": "", "system": "", "history": "[]"}
    empty = {name: "" for name in ("messages", "conversations")} | row
    assert messages_of(row) == messages_of(empty) == exchange(prompt, reply) and kinds_of(empty) == ["chat"]
    sides = {"chosen": exchange(prompt, reply), "rejected": exchange(prompt, other)}
    for pair in (
        {name: json.dumps(side) for name, side in sides.items()},
        {field: json.dumps([said("user", prompt)]), "chosen": reply, "rejected": other},
    ):
        assert tuple(pair_of(pair)) == ([said("user", prompt)], reply, other)
    plain = {"prompt": prompt, "chosen": f'["{reply}"', "rejected": "[]"}
    assert pair_of(plain).chosen == plain["chosen"], "a reply that looks like JSON is a reply"


# -- readers -----------------------------------------------------------------------------------------------------------


def written(folder: Path, rows: list[dict]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_doctor_and_training_agree_row_by_row(tmp_path, small):
    rows = [make("名", "b ") for make in FORMS.values()] + [*TOOL_FORMS.values()] + [row for row, _ in REFUSED.values()]
    path = written(tmp_path, rows)
    bad = BadRows("skip")
    numbered = dict(read_conversations(path, bad=bad))
    assert len(numbered) == len(FORMS) + len(TOOL_FORMS) and bad.count == len(REFUSED)
    data = SFTData(path, val_fraction=0, cache_dir=tmp_path / "cache", on_bad_row="skip")
    chats = SFTDataset(data, small, True, rows_per_step=1).train.chats
    encoded = [encode_chat(small, messages, False) for messages in numbered.values()]
    assert chats.tokens.tolist() == sum(encoded, []) and len(set(map(tuple, encoded[: len(FORMS)]))) == 1
    survey = Survey([path], "chat", small, 64).result
    assert (survey["used_rows"], survey["bad_rows"]) == (len(numbered), len(REFUSED))


def test_doctor_and_preference_tuning_agree_row_by_row(tmp_path, small):
    rows = [make("名", "b ", "c") for make in PAIRS.values()] + [{"chosen": "b", "rejected": "c"}, {"prompt": "a"}]
    path = written(tmp_path, rows)
    pairs = [pair for _, pair in read_pairs(path, bad=BadRows("skip"))]
    assert len(pairs) == len(PAIRS) and len({render_chat(pair.prompt, True) for pair in pairs}) == 1
    data = PreferenceData(path, val_fraction=0, cache_dir=tmp_path / "cache", on_bad_row="skip")
    dataset = PreferenceDataset(data, small, "full", 0)
    survey = Survey([path], "pairs", small, 64).result
    assert survey["used_rows"] == dataset.meta["pairs"] == len(pairs) and survey["bad_rows"] == 2


def test_the_kinds_of_a_row():
    assert kinds_of({"instruction": "a", "output": "b", "text": "c"}) == ["chat", "text"]
    assert kinds_of({"messages": exchange("a", "b"), "chosen": None, "text": None}) == ["chat"]
    assert kinds_of({"messages": exchange("a", "b"), "rejected_response": "c"}) == ["pairs"]
    assert kinds_of({"document": "a"}, "document") == ["text"] and kinds_of({"document": "a"}) == []
