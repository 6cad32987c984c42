"""scripts.eval.report: bad rows, impossible values and flags without effect, one sentence each."""

import json
from pathlib import Path

import pytest

from scripts.engine.report import page
from scripts.eval import report
from tests.scripts.report.conftest import BOTH, ROWS, flags, sources_in

BAD_ROWS = {
    'field "reference" is a number': ("open", {"question": "a", "reference": 5}),
    'field "answer" is missing': ("questions", {"question": "a"}),
    'field "final" is a number': ("questions", {"question": "a", "answer": "b", "final": 18}),
    'expected "forward" or "backward"': ("poems", {"prompt": "a", "question": "a", "answer": "b", "direction": "up"}),
    "expected at least 2 choices": ("choices", {"question": "a", "choices": ["b"], "answer": 0}),
    "expected the fields of a conversation": ("chat", {"question": "a"}),
    'field "text" is missing': ("text", {"question": "a"}),
}


@pytest.mark.parametrize("words", BAD_ROWS)
def test_a_bad_row_is_named_before_the_work(words, place, tokenizer_dir, refused, monkeypatch):
    form, row = BAD_ROWS[words]
    with Path(f"{form}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    monkeypatch.setattr(report, "load_all", lambda *a: pytest.fail("worked for nothing"))
    files = "text.jsonl" if form == "text" else f"text.jsonl,{form}.jsonl"
    given = ["--minimind-checkpoint", "ar_state_dict.pt", "--tokenizer-dir", tokenizer_dir]
    refused(report, [*given, "--eval-data", files], f"{form}.jsonl, row 13: ", words)


def test_bad_rows_of_every_format_are_left_out_counted_and_told(place, tokenizer_dir, command, undrawn):
    reports, names = [], [f"{form}.jsonl" for form in ROWS]
    for more in ((), ("--on-bad-row", "skip")):
        argv = [*BOTH, *flags(tokenizer_dir, "--eval-data", ",".join(names), "--frontier-questions", 0), *more]
        result = command(report, [*argv, "--out", "new"])
        assert result.code == 0, result.err
        reports.append(sources_in("new"))
        for name in names:
            rows = Path(name).read_bytes()
            Path(name).write_bytes(b"{\n" + rows + b'{"text": 5}\n')
    for before, after in zip(*reports, strict=True):
        assert before["items"] == after["items"] and before["left_out"] | {"bad": 2} == after["left_out"]
        assert after["skipped_rows"] == 2 and after["skipped_first"][0].startswith("row 1: not valid JSON")
        assert f"{after['path']}: 2 bad rows skipped: row 1: " in result.err


ASKED = (*BOTH, "--eval-data", "questions.jsonl")


@pytest.mark.parametrize(
    "more, words",
    [
        ((), "give --minimind-checkpoint, --diffusion-checkpoint or both; or a report.json as --from"),
        (("--from", "nowhere.json"), "nowhere.json does not exist"),
        ((*BOTH[:3], "ar_state_dict.pt"), "ar_state_dict.pt, given as --diffusion-checkpoint, is autoregressive"),
        ((*BOTH, "--eval-data", "odd.jsonl"), "odd.jsonl, row 1: fields a, b are of no known format"),
        ((*BOTH, "--eval-data", "nowhere.jsonl"), "nowhere.jsonl does not exist"),
        ((*BOTH, "--eval-data", "text.jsonl", "--gen-temp", "1"), "--gen-temp has no effect without"),
        ((*BOTH, "--eval-data", "text.jsonl", "--canvas", "9"), "--canvas has no effect without"),
        ((*BOTH, "--eval-data", "text.jsonl", "--val-fraction", "0.1"), "--val-fraction has no effect without"),
        ((*BOTH, "--eval-data", "questions.jsonl", "--nmc", "9"), "--num-samples has no effect without"),
        ((*BOTH, "--eval-data", "questions.jsonl", "--eval-split", "validation"), "--eval-split has no effect"),
        ((*BOTH[:2], "--eval-data", "questions.jsonl", "--gen-temp", "1"), "--gen-temp has no effect without"),
        ((*BOTH[:2], "--eval-data", "questions.jsonl", "--frontier-steps", "1"), "--frontier-steps has no effect"),
        ((*ASKED, "--frontier-questions", "0", "--frontier-steps", "1"), "--frontier-steps has no effect without"),
        ((*ASKED, "--frontier-questions", "0", "--gen-factor", "2"), "--gen-factor has no effect without"),
        ((*BOTH, "--eval-data", "questions.jsonl", "--seq-len", "65"), "no question fits --max-seq-len 65"),
        ((*BOTH, "--out", "text.jsonl"), "--out: "),
        ((*BOTH, "--out", "text.jsonl/new"), "--out: "),
        ((*BOTH, "--out", "new/" + 300 * "x"), "--out: new/xxx"),
        ((*BOTH, "--eval-data", "text.jsonl,./text.jsonl"), "text.jsonl is given twice"),
        (("--minimind-checkpoint", "ar_state_dict.pt,./a/../ar_state_dict.pt"), "ar_state_dict.pt is given twice"),
        (("--from", "."), ". cannot be read"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(more, words, place, tokenizer_dir, refused):
    Path("odd.jsonl").write_text('{"a": 1, "b": 2}\n')
    given = [] if "--from" in more else ["--tokenizer-dir", tokenizer_dir]
    refused(report, [*more, *given], words)


def test_a_file_that_is_cut_foreign_or_of_another_version_gets_one_sentence(made, workspace, refused):
    whole = json.dumps(made[1])
    contents = {
        "cut": whole[: len(whole) // 2],
        "deep": 200_000 * "[",
        "list": "[1]",
        "version": json.dumps(made[1] | {"report_format": page.FORMAT - 1}),
        "part": json.dumps({name: value for name, value in made[1].items() if name != "models"}),
    }
    for name, content in contents.items():
        Path(f"{name}.json").write_text(content, encoding="utf-8")
        sentence = f"{name}.json is not a report of this version (format {page.FORMAT}); give a report.json that"
        refused(report, ["--from", f"{name}.json"], sentence)
    Path("bytes.json").write_bytes(b"\xff\xfe")
    refused(report, ["--from", "bytes.json"], "bytes.json is not a report of this version")
