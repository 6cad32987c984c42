"""The data doctor: what it says about a file, with which exit code, and that its commands train."""

import gzip
import importlib
import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest

from dataset.preferences import PreferenceData, PreferenceDataset
from dataset.sft import DiffusionSFTData, SFTData, SFTDataset
from dataset.tokenizer import encode, encode_chat, save_tokenizer
from scripts import check_data as check
from scripts.engine import cli


@pytest.fixture
def doctor(tmp_path, monkeypatch, small, capsys):
    """doctor(rows, *flags, name) -> (exit code, what it printed, what it wrote as JSON)."""
    monkeypatch.chdir(tmp_path)
    save_tokenizer(small, tmp_path)

    def run(rows, *flags, name="rows.jsonl"):
        if isinstance(rows, list):
            rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        if rows is not None:
            Path(name).write_bytes(gzip.compress(rows) if name.endswith(".gz") else rows)
        with pytest.raises(SystemExit) as stop:
            cli.run(check.main, [name, "--json", "found.json", *flags])
        told = capsys.readouterr()
        if stop.value.code == 2:
            return 2, told.err, None
        return stop.value.code, told.out, json.loads(Path("found.json").read_text())

    return run


def chat(*contents: str, role: str = "user") -> dict:
    roles = [role if place % 2 == 0 else "assistant" for place in range(len(contents))]
    return {"messages": [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]}


TEXTS = ["one", "今天天气很好", "the river", "one", "", " one\n", "ends <|im_end|> here"]


def test_what_it_counts_in_documents(doctor, small):
    code, told, found = doctor([{"text": text} for text in TEXTS], "--max-seq-len", "8", name="rows.jsonl.gz")
    documents = [text for text in TEXTS if text]
    tokens = [len(encode(small, text)) for text in documents]
    assert code == 0 and "Sound: every row can be used." in told
    assert (found["rows"], found["used_rows"], found["empty_rows"], found["bad_rows"]) == (7, 6, 1, 0)
    assert found["counts"]["tokens"] == sum(tokens) + 2 * 6
    assert found["counts"]["longer"] == sum(count + 2 > 8 for count in tokens)
    assert {int(length): count for length, count in found["lengths"].items()} == {
        length: [count + 2 for count in tokens].count(length) for length in {count + 2 for count in tokens}
    }
    assert (found["copies"], found["first_copies"]) == (2, [[4, 1], [6, 1]])
    assert found["languages"] == {
        "zh": {"rows": 1, "characters": 6, "text_tokens": tokens[1]},
        "other": {"rows": 5, "characters": 40, "text_tokens": sum(tokens) - tokens[1]},
    }
    assert found["control_tokens"] == {"<|im_end|>": 1} and found["first_spelling_rows"] == [7]
    assert "  1  rows that spell control tokens" in told and "first in row 7: <|im_end|> in 1\n" in told
    assert "2; row 4 repeats row 1; row 6 repeats row 1" in told and "nothing is cut" in told
    assert found["unpacked_bytes"] == len(gzip.decompress(Path("rows.jsonl.gz").read_bytes()))


def test_rows_that_spell_control_tokens_are_told_and_which_of_them_would_be_bad(doctor):
    code, told, _ = doctor([{"text": text} for text in ("<|mask|>", "<|im_start|>", "<|endoftext|><|mask|>", "<|")])
    assert code == 0
    assert "  3  rows that spell control tokens" in told and "  2  rows that spell mask or padding" in told
    assert "first in row 1, 2, 3: <|mask|> in 2" in told


def test_bad_rows_are_listed_counted_by_reason_and_end_with_exit_code_1(doctor):
    rows = [b'{"text": "a"}', b"{", b"", b'{"text": 5}', *[b'{"txt": "a"}'] * 30, b'{"text": 6}', b"[1, 2"]
    code, told, found = doctor(b"\n".join(rows))
    assert code == 1 and "33 " not in told.splitlines()[0]
    assert (found["rows"], found["used_rows"], found["bad_rows"], found["lines"]) == (35, 1, 34, 36)
    assert found["bad_by_reason"] == {
        'field "text" is missing': 30,
        "not valid JSON at column N": 2,
        'field "text" is a number, expected a string': 2,
    }
    assert [row.split(":")[0] for row in found["first_bad"]] == [f"row {n}" for n in (2, 4, *range(5, 23))]
    assert "row 2: not valid JSON at column 2" in told and "the first 20:" in told
    assert "--on-bad-row skip" in told and "36 lines" in told


@pytest.mark.parametrize("num_bad", [1, 30, 59])
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz", ".jsonl", ".csv"])
def test_the_share_of_bad_rows_is_of_what_can_be_bad(suffix, num_bad, doctor):
    """Lines in a plain text, whose documents hold many of them; rows elsewhere: at most all, and half are 50 %."""
    good, bad = {".jsonl": (b'{"text": "a"}', b'{"txt": 1}'), ".csv": (b"a", b"a,b")}.get(
        suffix, ("猫".encode(), b"\xff")
    )
    lines = [good if i < 60 - num_bad else bad for i in range(60)]
    content = b"\n".join([b"text"] * (suffix == ".csv") + lines) + b"\n"
    code, told, found = doctor(content, "--kind", "text", name=f"rows{suffix}")
    assert code == 1 and found["bad_rows"] == num_bad and found[found["bad_unit"]] == 60
    assert found["used_rows"] + found["empty_rows"] <= found["rows"]
    assert f"{found['bad_unit']}: {num_bad} ({num_bad / 60:.1%})." in told
    assert found["lines"] == (None if suffix == ".csv" else 60) and ("lines" in told) == (suffix != ".csv")


def test_of_several_files_rows_are_named_with_their_file(doctor):
    Path("many").mkdir()
    Path("many/a.jsonl").write_text('{"text": "one"}\n{"text": 5}\n')
    Path("many/b.jsonl").write_text('{"text": "the river"}\n{"text": "one"}\n')
    code, told, found = doctor(None, name="many")
    assert code == 1 and (found["rows"], found["bad_rows"], found["lines"]) == (4, 1, 4)
    assert "longest 5 (row 1 of b.jsonl)" in re.sub(r"longest \d+", "longest 5", told)
    assert "row 2 of b.jsonl repeats row 1 of a.jsonl" in told and "a.jsonl, row 2: " in told and "(25.0%)" in told


@pytest.mark.parametrize("limit", [16, 40, 512])
def test_what_is_shortened_is_what_training_shortens(limit, doctor, small, tmp_path):
    rows = [chat("a", "b" * 30), chat("word " * 30, "b"), chat("a", "b", "c", "d" * 25), chat("a", "")]
    code, told, found = doctor(rows, "--max-seq-len", str(limit))
    assert code == 0 and found["counts"]["several_replies"] == found["counts"]["empty_replies"] == 1
    assert found["counts"]["user messages"] == found["counts"]["assistant messages"] == 5
    assert sum(int(n) * count for n, count in found["lengths"].items()) == sum(
        len(encode_chat(small, row["messages"], False)) for row in rows
    )
    for name, config, together in (("ar", SFTData, True), ("diffusion", DiffusionSFTData, False)):
        data = config(Path("rows.jsonl"), max_seq_len=limit, val_fraction=0, cache_dir=tmp_path / "cache")
        made = SFTDataset(data, small, together, rows_per_step=1)
        assert len(made.train) == found["counts"][f"{name} rows"]
        for what in ("shortened", "cut_prompts", "cut_replies"):
            assert made.meta[what] == found["counts"][f"{name} {what}"]
        kept = made.train.items(range(len(made.train))).lengths.sum() if len(made.train) else 0
        assert found["counts"][f"{name} tokens"] - found["counts"][f"{name} lost"] == kept


@pytest.mark.parametrize("limit", [16, 512])
def test_of_pairs_it_tells_what_is_equal_and_what_is_shortened(limit, doctor, small, tmp_path):
    rows = [("a", "b", "b"), ("a", "b" * 40, "c"), ("word " * 30, "b", "cc"), ("a", "b" * 40 + "c", "b" * 40)]
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]
    code, told, found = doctor(rows, "--max-seq-len", str(limit))
    config = PreferenceData(Path("rows.jsonl"), max_seq_len=limit, val_fraction=0, cache_dir=tmp_path / "cache")
    made = PreferenceDataset(config, small, "full", 0)
    assert code == 0 and found["kind"] == "pairs"
    assert found["counts"]["equal_replies"] == made.meta["equal_replies"] == (2 if limit == 16 else 1)
    for what in ("shortened", "cut_prompts", "cut_replies"):
        assert made.meta[what] == found["counts"][f"pairs {what}"]
    assert found["counts"]["longer_chosen"] == 2


def test_the_kind_of_rows_is_told_by_their_fields_or_by_a_flag(doctor):
    rows = {
        "text": {"text": "a"},
        "chat": {"instruction": "a", "output": "b", "text": "c"},
        "pairs": {"prompt": "a", "chosen": "b", "rejected": "c"},
    }
    for kind, row in rows.items():
        assert doctor([5, row])[2]["kind"] == kind
    code, _, found = doctor([rows["pairs"]], "--kind", "chat")
    assert (code, found["kind"], found["bad_rows"]) == (1, "chat", 1)
    code, told, found = doctor([{"content": "a"}])
    assert (code, found["kind"]) == (1, "text") and "choose one with --jsonl-field" in told
    assert "of no known format" in told
    code, told, found = doctor([{"content": "a", "text": 1}], "--jsonl-field", "content")
    assert code == 0 and "--jsonl-field content" in told


UNUSED = {  # kind -> a row; what of it is text that is not used
    "text": ({"text": "a b", "title": "two words", "part": "a", "url": "https://a.b?c", "n": 3}, ["title"]),
    "chat": (chat("a b", "c") | {"prompt": "a b", "lang": "en", "weight": "1", "system": "river"}, []),
    "pairs": ({"prompt": "a", "chosen": "b", "rejected": "c", "history": []}, []),
    "choices": ({"question": "a", "choices": ["b", "c"], "answer": "b", "lang": "zh"}, []),
    "questions": ({"question": "a", "answer": "b", "final": "c", "split": "d"}, []),
}


@pytest.mark.parametrize("kind", UNUSED)
def test_text_that_is_not_used_is_named_by_file_and_field_whatever_its_name(kind, doctor):
    """Metadata of several words or of another script, and one word in a field of no known name."""
    row, unused = UNUSED[kind]
    rows = [row | {"meta": {"note": "the river is long"}, "remark": "Paris"}, row | {"source": "小说"}, row]
    told = doctor(rows, "--kind", kind)[1]
    found = re.findall('note +field "(.*)" holds text in (\\d) of 3 rows and is not used', told)
    assert sorted(found) == sorted([("meta", "1"), ("remark", "1"), ("source", "1"), *((n, "3") for n in unused)])
    Path("many").mkdir()
    for name, some in (("a", rows[:1]), ("b", rows[2:])):
        Path(f"many/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some), encoding="utf-8")
    told = doctor(None, "--kind", kind, name="many")[1]
    assert 'a.jsonl: field "meta" holds text in 1 of 1 rows' in told and 'b.jsonl: field "meta"' not in told


@pytest.mark.parametrize(
    "rows, name, flags, words",
    [
        (None, "absent.jsonl", [], "does not exist"),
        (b"", "rows.jsonl", [], "has no rows"),
        (b"\n \n", "rows.jsonl", [], "has no rows"),
        (b"", "rows.txt", [], "is empty"),
        (b"x", "rows.xlsx", [], "unknown file type"),
        (gzip.compress(b"{}", mtime=0), "rows.jsonl", [], "rename it to end in .gz"),
        (b"text\n", "rows.txt", ["--kind", "chat"], "plain text"),
        (b"text\n", "rows.txt", ["--jsonl-field", "a"], "--jsonl-field has no effect"),
        ([chat("a", "b")], "rows.jsonl", ["--kind", "chat", "--jsonl-field", "a"], "--jsonl-field has no effect"),
        ([chat("a", "b")], "rows.jsonl", ["--max-seq-len", "3"], "--max-seq-len must be at least 16, not 3"),
    ],
)
def test_a_file_that_cannot_be_read_ends_with_exit_code_2(rows, name, flags, words, doctor):
    code, told, _ = doctor(rows, *flags, name=name)
    assert code == 2 and words in told and told.startswith("error: ") and told.count("\n") == 1


@pytest.mark.parametrize(
    ("place", "words"), [("rows.jsonl", "reads"), ("./tokenizer.json", "reads"), (".", "cannot be written")]
)
def test_an_impossible_place_for_the_result_is_refused_before_the_reading(place, words, doctor, monkeypatch):
    monkeypatch.setattr(check, "Survey", lambda *a: pytest.fail("read for nothing"))
    code, told, _ = doctor([{"text": "a"}], "--json", place)
    assert code == 2 and "--json" in told and words in told
    assert Path("rows.jsonl").read_text() == '{"text": "a"}\n'


@pytest.mark.parametrize(
    ("rows", "name"),
    [
        ([{"text": ""}], "rows.jsonl"),
        ([{"text": " \n"}], "rows.jsonl"),
        (b"\n \n\n", "rows.txt"),
        ([chat("a", "")], "rows.jsonl"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], "rows.jsonl"),
    ],
)
def test_where_nothing_is_left_to_train_on_it_says_so(rows, name, doctor):
    code, told, _ = doctor(rows, name=name)
    assert code == 1 and "Nothing to train on." in told and "uv run" not in told


@pytest.mark.parametrize("rows", [[5, 6], [5, {"text": ""}]])
def test_where_only_bad_rows_could_be_trained_on_they_are_not_to_be_left_out(rows, doctor):
    code, told, _ = doctor(rows)
    assert code == 1 and "without them there is nothing to train on" in told and "skip" not in told


SOUND = [{"text": "a"}], [chat("a", "b")], [{"prompt": "a", "chosen": "b", "rejected": "c"}]


@pytest.mark.parametrize("rows", SOUND)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows of mine.jsonl.gz"])
def test_the_commands_that_it_ends_with_are_commands(rows, name, doctor, capsys):
    code, told, _ = doctor([*rows, 5], "--max-seq-len", "99", name=name)
    commands = re.findall("uv run python -m (.*)", told)
    assert code == 1 and commands
    for module, *argv in map(shlex.split, commands):
        assert argv[argv.index("--data") + 1] == name and argv[-2:] == ["--on-bad-row", "skip"]
        with pytest.raises(SystemExit):
            cli.run(importlib.import_module(module).main, [*argv, "--max-iters", "x"])
        assert capsys.readouterr().err.startswith("error: argument --max-iters"), "all other flags are flags"


# -- positional arguments ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """A group."""

    place: Annotated[Path, "a place"]
    number: Annotated[int, "a number"] = 3


def test_a_field_without_default_is_positional(capsys):
    for argv in (["a_b", "--number", "4"], ["--number", "4", "a_b"]):
        assert cli.parse_args("d", Group, argv=argv) == (Group(Path("a_b"), 4), {"place", "number"})
    for argv, words in (
        ([], "required: PLACE"),
        (["a", "b"], "unrecognized arguments: b"),
        (["--place", "a"], "unrecognized arguments: --place"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.parse_args("d", Group, argv=argv)
        assert stop.value.code == 2 and words in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.parse_args("d", Group, argv=["--help"])
    told = capsys.readouterr().out
    assert "PLACE [FLAGS]" in told and re.search(r"PLACE +a place$", told, re.MULTILINE)


def test_questions_are_evaluated_and_the_commands_say_so(doctor):
    row = {"question": "1 + 1?", "choices": ["2", "3", "the river"], "answer": "A", "explanation": "a b"}
    code, told, found = doctor([row, row, {**row, "answer": "D"}])
    assert code == 1 and found["kind"] == "choices" and found["copies"] == 1 and found["bad_rows"] == 1
    assert found["counts"]["questions with 3 choices"] == 2 and 'field "explanation" holds text in 2 of 2 rows' in told
    assert "scripts.eval.likelihood --checkpoint" in told and "--eval-data rows.jsonl --on-bad-row skip" in told
    code, told, found = doctor([{"question": "1 + 1?", "answer": "It is\n#### 2"}], "--kind", "questions")
    assert code == 0 and found["counts"]["wanted_end"] == 1 and "scripts.eval.report --minimind" in told
    code, told, found = doctor(None)
    assert found["kind"] == "chat" and "--kind questions reads questions with their answers" in told
    code, error, _ = doctor([{**row, "answer": 1}, {**row, "answer": 3}])
    assert code == 2 and "rows.jsonl: the answers seem to count from 1" in error
