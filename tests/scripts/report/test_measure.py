"""What scripts.eval.report measures: which rows, for all models the same, and the values that it records of them."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from dataset.content import is_validation
from dataset.corpus.bundled import choices, questions
from dataset.rows.formats import read_conversations
from dataset.tokenizer import encode, encode_chat, render_chat
from model.decoding.decode import ContinuationConfig
from scripts.engine.decoding.generation import generate
from scripts.engine.likelihood.documents import response_likelihood
from scripts.engine.prompts import Prompt
from scripts.engine.report import measure
from scripts.engine.report.measure import MeasureConfig, form_of
from scripts.engine.report.results import DIFFUSION, rows_of
from scripts.engine.runtime import RuntimeConfig
from scripts.eval import likelihood, report
from tests.scripts.conftest import write_rows
from tests.scripts.models import ready, save
from tests.scripts.report.conftest import (
    AR,
    BOTH,
    DM,
    NEW_TOKENS,
    ROWS,
    SAMPLERS,
    flags,
    report_in,
    sources_in,
    write_files,
)

NO_FRONTIER = ("--frontier-questions", "0", "--out", "new")
ANSWERING = ("--canvas", "--max-new-tokens", "--gen-steps")  # flags without effect on documents
SCORING = ("--nmc", "--canvas")  # flags without effect if nothing is scored by a diffusion model

# -- rows --------------------------------------------------------------------------------------------------------------


def test_each_format_is_recognised_by_its_fields(made):
    assert {section["name"]: section["format"] for section in made[1]["sources"]} == {f"{n}.jsonl": n for n in ROWS}
    for section in made[1]["sources"]:
        keys = [item["key"] for item in section["items"]]
        assert len(keys) == 12 and keys == sorted(keys)
        assert {name: len(results) for name, results in section["results"].items()} == {AR: 12, DM: 12}


def test_a_row_that_fits_one_form_of_asking_alone_is_left_out_for_all_models(
    place, tokenizer, tokenizer_dir, command, undrawn
):
    """The AR model is asked as plain text, the other in the chat template, which takes more tokens."""
    question = ROWS["questions"][0]["question"]
    plain = 1 + len(encode(tokenizer, question))
    wrapped = len(encode_chat(tokenizer, [{"role": "user", "content": question}], True))
    assert plain < wrapped
    write_rows("q.jsonl", [{"question": text, "answer": "a"} for text in ("a", question)])
    argv = [*BOTH, *flags(tokenizer_dir, without=SCORING), "--eval-data", "q.jsonl", *NO_FRONTIER]
    assert command(report, [*argv, "--seq-len", wrapped - 1 + NEW_TOKENS]).code == 0
    (section,) = sources_in("new")
    assert [item["question"] for item in section["items"]] == ["a"]
    assert section["left_out"] == {"too_long": 1, "empty": 0, "bad": 0}
    assert all(len(results) == 1 for results in section["results"].values())


def test_neither_the_order_of_the_rows_nor_the_batches_change_a_number(made, place, tokenizer_dir, command, undrawn):
    more = ["--eval-data", write_files(place, -1), *NO_FRONTIER, "--batch-size", "5", "--eval-batch-size", "7"]
    assert command(report, [*BOTH, *flags(tokenizer_dir, *more)]).code == 0
    for before, after in zip(made[1]["sources"], sources_in("new"), strict=True):
        assert before["items"] == after["items"]
        for name in (AR, DM):
            expected, values = (untimed(section["results"][name]) for section in (before, after))
            assert [v for v in expected if isinstance(v, str)] == [v for v in values if isinstance(v, str)]
            numbers = ([v for v in some if not isinstance(v, str)] for some in (values, expected))
            np.testing.assert_allclose(*numbers, rtol=1e-4, atol=1e-6)


def untimed(value) -> list:
    """The values within a JSON value in order, except seconds."""
    if isinstance(value, dict):
        return [part for key, inner in value.items() if key != "seconds" for part in untimed(inner)]
    return [part for inner in value for part in untimed(inner)] if isinstance(value, list) else [value]


def test_limits_take_the_same_random_rows_from_any_order(place, tokenizer_dir, command, undrawn):
    keys = []
    for order in (1, -1):
        more = ["--eval-data", write_files(place, order), *NO_FRONTIER, "--max-rows", "5", "--questions", "3"]
        assert command(report, [*BOTH[:2], *flags(tokenizer_dir, *more, without=(*SCORING, "--gen-steps"))]).code == 0
        keys.append({section["format"]: [item["key"] for item in section["items"]] for section in sources_in("new")})
    assert keys[0] == keys[1]
    numbers = {form: len(some) for form, some in keys[0].items() if form != "chat"}
    assert numbers == {"text": 5, "choices": 5, "poems": 2, "open": 3, "questions": 3}


def test_the_string_named_final_is_what_is_looked_for(place, tokenizer_dir, command, undrawn):
    write_rows("q.jsonl", [{"question": "a", "answer": "the cat sees", "final": "18"}])
    argv = [*BOTH[:2], "--eval-data", "q.jsonl", "--tokenizer-dir", tokenizer_dir, "--dtype", "float32"]
    assert command(report, [*argv, *NO_FRONTIER]).code == 0
    (item,) = sources_in("new")[0]["items"]
    assert (item["wanted"], item["reference"]) == ("18", "the cat sees")


def test_without_files_the_bundled_rows_are_asked_and_what_training_held_out_is_scored(
    place, tokenizer_dir, command, monkeypatch
):
    rows = {"questions": questions()[:9], "choices": choices()[:9], "pretrain": ROWS["text"], "sft": ROWS["chat"]}
    for name, some in rows.items():
        write_rows(f"{name}.jsonl", some)
    monkeypatch.setattr(measure, "bundled_file", lambda name: Path(f"{name}.jsonl"))
    argv = [*BOTH, *flags(tokenizer_dir), "--val-fraction", "0.4", "--seq-len", "200", *NO_FRONTIER]
    assert command(report, argv).code == 0
    sections = sources_in("new")
    assert [section["format"] for section in sections] == ["questions", "choices", "text", "chat"]
    assert all(
        section["bundled"] and section["format"] == form_of(Path(section["path"]), MeasureConfig())
        for section in sections
    )
    held_out = [text for row in ROWS["text"] if is_validation(text := row["text"], 0.4)]
    assert 0 < len(held_out) < 12
    assert sorted(item["bytes"] for item in sections[2]["items"]) == sorted(len(text.encode()) for text in held_out)
    conversations = [messages for _, messages in read_conversations(Path("sft.jsonl"))]
    kept = [messages for messages in conversations if is_validation(render_chat(messages, False), 0.4)]
    replies = [[m["content"] for m in messages if m["role"] == "assistant"] for messages in kept]
    assert 0 < len(kept) < len(conversations)
    assert sorted(item["bytes"] for item in sections[3]["items"]) == sorted(len("".join(r).encode()) for r in replies)
    page = Path("new/report.md").read_text(encoding="utf-8")
    assert page.count("Answers, unedited") == 1 and "of which those that training held out" in page


# -- poems -------------------------------------------------------------------------------------------------------------

LINES = [("cat", "dog"), ("sun", "moon"), ("red", "blue"), ("one", "two"), ("up", "down"), ("ab", "cd")]
LONG = "the cat sees a small dog in the garden of the house "


@pytest.fixture
def ask(place, tokenizer_dir, command, undrawn):
    """ask(couplets, *flags) -> the result of the command on their poems."""

    def run(couplets, *more):
        rows = [
            {"prompt": prompt, "answer": answer, "question": f"{prompt}?", "direction": direction}
            for pair in couplets
            for direction, (prompt, answer) in (("forward", pair), ("backward", pair[::-1]))
        ]
        write_rows("p.jsonl", rows)
        argv = [*BOTH[:2], "--eval-data", "p.jsonl", "--dtype", "float32", "--tokenizer-dir", tokenizer_dir]
        return command(report, [*argv, "--max-new-tokens", "6", *NO_FRONTIER, *more])

    return run


@pytest.mark.parametrize("limit, kept", [(2, 2), (5, 4), (7, 6), (12, 12)])
def test_a_sample_holds_both_directions_of_a_couplet_or_neither(limit, kept, ask):
    assert ask(LINES, "--questions", limit).code == 0
    items = sources_in("new")[0]["items"]
    directions: dict[str, set[str]] = {}
    for item in items:
        directions.setdefault(item["couplet"], set()).add(item["direction"])
    assert len(items) == kept == 2 * len(directions)
    assert all(both == {"forward", "backward"} for both in directions.values())


def test_a_limit_below_a_couplet_is_refused(ask):
    result = ask(LINES, "--questions", 1)
    assert result.code == 2 and "p.jsonl: no couplet has as few as 1 rows; raise --questions" in result.err


def test_a_couplet_of_which_one_direction_is_too_long_is_left_out_in_both(ask, tokenizer):
    assert ask([*LINES, (LONG, "cat")], "--seq-len", len(encode(tokenizer, LONG)) + 6).code == 0
    (section,) = sources_in("new")
    assert section["left_out"]["too_long"] == 2
    assert {item["reference"] for item in section["items"]} == {line for pair in LINES for line in pair}


# -- values ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kind", [(AR, "causal"), (DM, "full")])
def test_an_answer_is_that_of_generate_with_the_seed_plus_its_place(name, kind, sections, models):
    for place in (0, 5):
        text = sections["questions"]["items"][place]["question"]
        prompt = Prompt(text if kind == "causal" else [{"role": "user", "content": text}])
        continuation = ContinuationConfig(NEW_TOKENS, gen_seed=11 + place)
        expected = generate(models[name], prompt, continuation, SAMPLERS[kind])
        fields = "text", "num_tokens", "ended", "num_forward_passes"
        recorded = sections["questions"]["results"][name][place]
        assert [recorded[field] for field in fields] == [getattr(expected, field) for field in fields]


def test_the_likelihood_of_a_reference_is_that_of_the_response(sections, models):
    """Without the template a blank stands between question and answer, except for Chinese."""
    poems = sections["poems"]
    for place, item in enumerate(poems["items"][:4]):
        first = item["reference"][0]
        blank = "" if first.isspace() or "\u4e00" <= first <= "\u9fff" else " "
        for name, response in ((AR, blank + item["reference"]), (DM, item["reference"])):
            likelihood = poems["results"][name][place]["reference_likelihood"]
            prompt = Prompt([{"role": "user", "content": item["question"]}] if name == DM else item["question"])
            expected = response_likelihood(models[name], prompt, response, 2)
            assert likelihood["nats"] == pytest.approx(-expected["log_likelihood"], rel=1e-4)
            assert likelihood["tokens"] == expected["tokens"]


# -- models ------------------------------------------------------------------------------------------------------------


def test_one_kind_alone_has_no_differences(place, tokenizer_dir, command, undrawn):
    more = ["--eval-data", "questions.jsonl,text.jsonl", *NO_FRONTIER]
    assert command(report, [*BOTH[2:], *flags(tokenizer_dir, *more, without=("--canvas",))]).code == 0
    content = report_in("new")
    assert [model["kind"] for model in content["models"]] == [DIFFUSION] and content["frontier"] is None
    assert all(not row.differences for section in content["sources"] for row in rows_of(section, content["models"]))


def test_models_of_blocks_stand_beside_the_others(place, tokenizer, tokenizer_dir, command, no_figures):
    """Named, scored by all their masks, decoded in their blocks, and a line of the frontier each."""
    for size in (1, 3):
        save(f"b{size}_state_dict.pt", ready(tokenizer, f"block {size}"), "sft")
    argv = [*BOTH[:-1], "dm_state_dict.pt,b1_state_dict.pt,b3_state_dict.pt", *flags(tokenizer_dir), "--max-rows", "3"]
    argv += ["--eval-data", "text.jsonl,chat.jsonl,questions.jsonl", "--frontier-questions", "1", "--out", "new"]
    argv += ["--frontier-steps", "1", "--frontier-thresholds", "0.9", "--frontier-factors", "1"]
    result = command(report, argv)
    assert result.code == 0, result.err
    content, page = report_in("new"), Path("new/report.md").read_text(encoding="utf-8")
    names = [AR, DM, "diffusion b1", "diffusion b3"]
    shapes = [("causal", 0), ("full", 0), ("block", 1), ("block", 3)]
    assert [model["name"] for model in content["models"]] == names
    assert [(model["attention"], model["block_size"]) for model in content["models"]] == shapes
    for section in content["sources"][:2]:
        exact = [all(r["variance"] == 0 for r in section["results"][name]) for name in names]
        assert exact == [True, False, True, True]
    assert list(dict.fromkeys(point["model"] for point in content["frontier"]["points"])) == names
    for words in ("| diffusion b3 | blocks of 3 |", "2 masks drawn per row; all masks of blocks of up to 4 tokens"):
        assert words in page
    assert "; diffusion (full): nothing is kept" in page and "; diffusion (blocks of 3): keys and values of f" in page
    nats = next(line for line in page.splitlines() if line.startswith("| nats per token | all | 3 |"))
    assert [cell.strip().startswith("<= ") for cell in nats.split("|")[4:8]] == [False, True, False, True]
    assert "| diffusion b1 answers | " in page and "blocks of 3 tokens from left to right" in page


def test_models_of_one_name_are_told_apart_by_their_folders(monkeypatch):
    monkeypatch.setattr(report, "load_kind", lambda *a: None)
    request = report.Request((Path("a/m.pt"), Path("b/m.pt"), Path("b/n_state_dict.pt")))
    names = list(report.load_all(request, None, 8, RuntimeConfig(device="cpu")))
    assert names == ["AR a/m.pt", "AR b/m.pt", "AR n"]


def test_the_record_says_which_files_were_measured_and_how_they_were_asked(made):
    for model, name, wrap in zip(made[1]["models"], ("ar", "dm"), (False, True), strict=True):
        content = (made[0] / f"{name}_state_dict.pt").read_bytes()
        assert (model["sha256"], model["chat_wrap"]) == (hashlib.sha256(content).hexdigest(), wrap)


def test_the_format_asked_for_is_that_of_every_file(place, tokenizer_dir, command, refused, undrawn):
    row = {"question": "the cat", "answer": "the river", "explanation": "a b"}
    write_rows("rows.jsonl", [row])
    argv = [
        *BOTH,
        "--tokenizer-dir",
        str(tokenizer_dir),
        "--device",
        "cpu",
        "--eval-data",
        "rows.jsonl",
        "--out",
        "new",
    ]
    result = command(report, argv)
    assert sources_in("new")[0]["format"] == "questions" and "explanation stands beside" in result.err
    assert "--eval-format chat reads conversations" in result.err
    write_rows("rows.jsonl", [{"question": "the cat", "answer": "the river"}])
    assert command(report, [*argv, "--eval-format", "chat"]).code == 0
    assert sources_in("new")[0]["format"] == "chat"
    refused(report, [*argv, "--eval-format", "open"], 'row 1: field "reference" is missing')


def test_chain_rules_stand_beside_the_bound_of_the_same_documents_when_asked_for(
    made, place, tokenizer_dir, command, no_figures
):
    """A model that writes in one order alone shows what it is scored by; without the flag there is no such line."""
    write_rows("text.jsonl", ROWS["text"])
    argv = [*BOTH, *flags(tokenizer_dir, without=ANSWERING)]
    argv += ["--eval-data", "text.jsonl", "--out", "new", "--chain-rule-documents", "5"]
    assert command(report, argv).code == 0
    (section,) = sources_in("new")
    results = {name: [r for r in section["results"][name] if "chain_rules" in r] for name in (AR, DM)}
    assert [len(some) for some in results.values()] == [5, 5]
    assert all(r["chain_rules"] == {"bound": r["nats"]} for r in results[AR])
    rows = {row.metric.name: row for row in rows_of(section, report_in("new")["models"]) if row.group == "all"}
    size = sum(
        item["bytes"] for item, r in zip(section["items"], section["results"][DM], strict=True) if "chain_rules" in r
    )
    for rule in ("bound", "left to right", "by confidence"):
        row = rows[f"bits per byte, {rule}"]
        nats = sum(r["chain_rules"][rule] for r in results[DM]), sum(r["nats"] for r in results[AR])
        assert (row.values[DM].value, row.values[AR].value) == pytest.approx([n / np.log(2) / size for n in nats])
        assert row.count == 5
    assert "- bits per byte, by confidence: " in Path("new/report.md").read_text(encoding="utf-8")
    assert "bits per byte, " not in (made[0] / "report" / "report.md").read_text(encoding="utf-8")


def test_joint_weights_show_what_they_pay_autoregressively_beside_their_bound(
    place, tokenizer, tokenizer_dir, command, no_figures
):
    """In the report of the diffusion model, the number that the likelihood of the same file has as an AR model's."""
    save("joint_state_dict.pt", ready(tokenizer, "joint 3"), quantize_effective_length=True)
    write_rows("text.jsonl", ROWS["text"])
    files = BOTH[2], f"{BOTH[3]},joint_state_dict.pt", "--eval-data", "text.jsonl"
    argv = [*files, *flags(tokenizer_dir, without=ANSWERING), "--chain-rule-documents", "12", "--out", "new"]
    said = command(report, argv)
    assert said.code == 0, said.err
    (section,) = sources_in("new")
    rows = {row.metric.name: row.values for row in rows_of(section, report_in("new")["models"]) if row.group == "all"}
    argv = ["--checkpoint", "joint_state_dict.pt", "--write-as", "autoregressive", "--eval-data", "text.jsonl"]
    said = command(likelihood, [*argv, *flags(tokenizer_dir, "--json", "r.json", without=(*ANSWERING, "--nmc"))])
    assert said.code == 0, said.err
    found = json.loads(Path("r.json").read_text(encoding="utf-8"))["likelihood"]["all"]
    values = rows["bits per byte, autoregressive"]
    assert values["diffusion joint"].value == pytest.approx(found["bits_per_byte"], rel=1e-6)
    assert values[DM] == rows["bits per byte, left to right"][DM]  # which has no causal pass
    assert rows["bits per byte, left to right"]["diffusion joint"] != values["diffusion joint"]
