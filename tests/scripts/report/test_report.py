"""scripts.eval.report: every format, the same rows for all models, numbers that follow from what is recorded."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from dataset.corpus.bundled import choices, questions
from dataset.jsonl import is_validation
from dataset.sft import read_conversations
from dataset.tokenizer import encode, encode_chat, fingerprint, render_chat
from model.checkpoint import save_checkpoint
from model.decode import ContinuationConfig, DenoisingConfig, SamplingConfig
from model.remasking import POLICIES
from scripts.engine.decoding.answers import Answer, describe
from scripts.engine.decoding.generation import generate
from scripts.engine.likelihood.documents import response_likelihood
from scripts.engine.loaded import load_for_use
from scripts.engine.prompts import Prompt
from scripts.engine.report import measure as report_items
from scripts.engine.report import page as report_page
from scripts.engine.report.measure import form_of
from scripts.engine.report.results import DIFFUSION, METRICS, Estimate, groups_of, points_of, rows_of, summary_of
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.statistics import chrf, is_correct
from scripts.eval import likelihood, report
from tests.scripts.conftest import conversations, run_command, sentences
from tests.scripts.models import untrained

RUNTIME = RuntimeConfig(device="cpu", dtype="float32", seed=11)
SAMPLERS = {"causal": SamplingConfig(), "full": DenoisingConfig(gen_steps=4)}
AR, DM = "AR ar", "diffusion dm"
TEXTS = sentences(12, seed=3)
NEW_TOKENS, LENGTH = 6, 64


def question_rows() -> list[dict]:
    """What is asked for is a letter or a word that even a model of no training may write."""
    return [
        {"question": text.split(": ")[1][:20], "answer": "aeio猫"[i % 5], "lang": ("en", "zh")[i % 2]}
        | {"split": ("seen", "reversed")[i % 3 == 0], "kind": "ab"[i % 2]}
        for i, text in enumerate(TEXTS)
    ]


ROWS = {
    "text": [{"text": text[:40]} for text in TEXTS],
    "choices": [
        {"question": text[:12], "choices": ["the cat", "看见了", "a small dog"][: 2 + i % 2], "answer": i % 2}
        for i, text in enumerate(TEXTS)
    ],
    "poems": [
        {
            "prompt": line,
            "answer": other,
            "question": f"{line}?",
            "direction": direction,
            "seen_in_pretrain": i % 3 == 0,
        }
        for i, text in enumerate(TEXTS[:6])
        for line, other, direction in (
            (text[3:9], text[9:15], "forward"),
            (text[9:15], text[3:9], "backward"),
        )
    ],
    "open": [{"question": text[3:15], "reference": text[3:60]} for text in TEXTS],
    "questions": question_rows(),
    "chat": conversations(TEXTS),
}


def write_rows(folder: Path, order: int = 1) -> str:
    """A file of each format, as --eval-data takes them."""
    for form, rows in ROWS.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[::order])
        (folder / f"{form}.jsonl").write_text(lines, encoding="utf-8")
    return ",".join(f"{form}.jsonl" for form in ROWS)


def write_checkpoints(folder: Path, tokenizer) -> None:
    """Models of no training, the autoregressive one for plain text, the other for conversations."""
    for name, kind, stage in (("ar", "causal", "pretrain"), ("dm", "full", "sft")):
        model, path = untrained(tokenizer, kind), folder / f"{name}_state_dict.pt"
        save_checkpoint(path, model.config, model.state_dict(), tokenizer=fingerprint(tokenizer), stage=stage)


def flags(tokenizer_dir: Path, *more: object) -> list[str]:
    given = ["--tokenizer-dir", tokenizer_dir, "--dtype", "float32", "--device", "cpu", "--seed", "11"]
    given += ["--seq-len", LENGTH, "--max-new-tokens", NEW_TOKENS, "--nmc", "2", "--canvas", "12", "--gen-steps", "4"]
    return [str(one) for one in (*given, *more)]


BOTH = ("--minimind-checkpoint", "ar_state_dict.pt", "--diffusion-checkpoint", "dm_state_dict.pt")


@pytest.fixture(scope="module")
def made(request, tmp_path_factory, tokenizer, tokenizer_dir):
    """(folder with both checkpoints and all files, the report of them in report/), one for all modules that import
    this fixture, whose copies of it pytest takes for different ones."""
    if hasattr(request.session, "report_made"):
        return request.session.report_made
    folder = tmp_path_factory.mktemp("report")
    write_checkpoints(folder, tokenizer)
    more = ["--eval-data", write_rows(folder), "--out", "report", "--frontier-questions", "3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = run_command(report, [*BOTH, *flags(tokenizer_dir, *more), "--frontier-steps", "1,6"])
    assert result.code == 0, result.err
    request.session.report_made = folder, json.loads((folder / "report" / "report.json").read_text(encoding="utf-8"))
    return request.session.report_made


@pytest.fixture
def models(made, tokenizer):
    """name -> the model of the report."""
    files = {AR: made[0] / "ar_state_dict.pt", DM: made[0] / "dm_state_dict.pt"}
    return {name: load_for_use(path, tokenizer, LENGTH, RUNTIME) for name, path in files.items()}


@pytest.fixture
def undrawn(monkeypatch):
    """Nothing is drawn: it takes longer than what is measured."""
    monkeypatch.setattr(report, "draw", lambda *a: [])


@pytest.fixture
def sections(made):
    return {section["format"]: section for section in made[1]["sources"]}


@pytest.fixture
def summary(made):
    return summary_of(made[1])


@pytest.fixture
def place(made, workspace):
    """A folder with the checkpoints and files, in which the command runs."""
    shutil.copytree(made[0], workspace, dirs_exist_ok=True, ignore=shutil.ignore_patterns("report"))
    return workspace


# -- rows --------------------------------------------------------------------------------------------------------------


def test_each_format_is_recognised_by_its_fields(made):
    assert {section["name"]: section["format"] for section in made[1]["sources"]} == {f"{n}.jsonl": n for n in ROWS}
    for section in made[1]["sources"]:
        assert len(section["items"]) == 12 and all(len(results) == 12 for results in section["results"].values())
        assert list(section["results"]) == [AR, DM] and section["items"] == sorted(
            section["items"], key=lambda item: item["key"]
        )


def test_a_row_that_fits_one_form_of_asking_alone_is_left_out_for_all_models(
    place, tokenizer, tokenizer_dir, command, undrawn
):
    """The AR model is asked as plain text, the other in the chat template, which takes more tokens."""
    question = ROWS["questions"][0]["question"]
    plain = 1 + len(encode(tokenizer, question))
    wrapped = len(encode_chat(tokenizer, [{"role": "user", "content": question}], True))
    assert plain < wrapped
    rows = [{"question": text, "answer": "a"} for text in ("a", question)]
    Path("q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--eval-data", "q.jsonl", "--frontier-questions", "0", "--seq-len", wrapped - 1 + NEW_TOKENS]
    given = [flag for flag in flags(tokenizer_dir) if flag not in ("--nmc", "2", "--canvas", "12")]
    assert command(report, [*BOTH, *given, *more, "--out", "new"]).code == 0
    found = json.loads(Path("new/report.json").read_text())["sources"][0]
    assert [item["question"] for item in found["items"]] == ["a"]
    assert found["left_out"] == {"too_long": 1, "empty": 0, "bad": 0}
    assert all(len(results) == 1 for results in found["results"].values())


def test_neither_the_order_of_the_rows_nor_the_batches_change_a_number(made, place, tokenizer_dir, command, undrawn):
    more = ["--eval-data", write_rows(place, -1), "--frontier-questions", "0", "--batch-size", "5"]
    assert command(report, [*BOTH, *flags(tokenizer_dir, *more, "--eval-batch-size", "7"), "--out", "other"]).code == 0
    other = json.loads(Path("other/report.json").read_text(encoding="utf-8"))
    for before, after in zip(made[1]["sources"], other["sources"], strict=True):
        assert before["items"] == after["items"]
        for name, results in before["results"].items():
            (one, two) = (untimed(some) for some in (results, after["results"][name]))
            assert [value for value in one if isinstance(value, str)] == [v for v in two if isinstance(v, str)]
            numbers = ([value for value in some if not isinstance(value, str)] for some in (one, two))
            np.testing.assert_allclose(*numbers, rtol=1e-4, atol=1e-6)


def untimed(value) -> list:
    """What stands in a JSON value, in order, but for seconds."""
    if isinstance(value, dict):
        return [part for key, inner in value.items() if key != "seconds" for part in untimed(inner)]
    return [part for inner in value for part in untimed(inner)] if isinstance(value, list) else [value]


def test_limits_take_the_same_random_rows_from_any_order(place, tokenizer_dir, command, undrawn):
    keys = []
    for order in (1, -1):
        more = ["--eval-data", write_rows(place, order), "--frontier-questions", "0", "--out", f"r{order}"]
        limits = ["--max-rows", "5", "--questions", "3", "--minimind-checkpoint", "ar_state_dict.pt"]
        given = flags(tokenizer_dir, *more, *limits)
        for flag in ("--nmc", "--canvas", "--gen-steps"):
            del given[given.index(flag) : given.index(flag) + 2]
        assert command(report, given).code == 0
        found = json.loads(Path(f"r{order}/report.json").read_text(encoding="utf-8"))["sources"]
        keys.append([[item["key"] for item in section["items"]] for section in found])
    assert keys[0] == keys[1]
    assert dict(zip(ROWS, map(len, keys[0]), strict=True)) | {"chat": 0} == {
        **{"text": 5, "choices": 5, "poems": 2, "open": 3, "questions": 3, "chat": 0}
    }


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, kind", [(AR, "ar"), (DM, "dm")])
@pytest.mark.parametrize("form", ["text", "chat", "choices"])
def test_what_is_recorded_sums_to_the_numbers_of_the_likelihood_command(
    form, name, kind, place, tokenizer_dir, summary, command
):
    argv = ["--checkpoint", f"{kind}_state_dict.pt", "--eval-data", f"{form}.jsonl", "--json", "l.json"]
    argv += ["--tokenizer-dir", tokenizer_dir, "--dtype", "float32", "--device", "cpu", "--seed", "11"]
    argv += ["--seq-len", LENGTH, *(("--nmc", "2") if kind == "dm" else ())]
    argv += ["--canvas", "12"] if (kind, form) == ("dm", "chat") else []
    assert command(likelihood, argv).code == 0
    expected, found = json.loads(Path("l.json").read_text()), summary[f"{form}.jsonl"]
    metrics = (
        {"acc": "acc", "acc_norm": "acc_norm"}
        if form == "choices"
        else {
            "nats_per_token": "nats per token",
            "perplexity": "perplexity",
            "bits_per_byte": "bits per byte",
        }
    )
    languages = {"all": "all", "zh": "Chinese", "other": "English and other"}
    for language, values in expected["accuracy" if form == "choices" else "likelihood"].items():
        for field, metric in metrics.items():
            group = found[metric][languages[language]]
            assert group["models"][name] == pytest.approx(values[field], rel=1e-12)
            assert group["count"] == values["questions" if form == "choices" else "documents"]


def test_errors_are_those_of_the_likelihood_command(made, sections, place, tokenizer_dir, command):
    argv = ["--checkpoint", "dm_state_dict.pt", "--eval-data", "text.jsonl", "--json", "l.json", "--nmc", "2"]
    argv += [
        "--tokenizer-dir",
        tokenizer_dir,
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--seed",
        "11",
        "--seq-len",
        LENGTH,
    ]
    assert command(likelihood, argv).code == 0
    expected = json.loads(Path("l.json").read_text())["likelihood"]["all"]
    found = {
        row.metric.name: row.values[DM] for row in rows_of(sections["text"], made[1]["models"]) if row.group == "all"
    }
    assert found["nats per token"].error == pytest.approx(expected["standard_error"])
    assert found["bits per byte"].error == pytest.approx(expected["bits_per_byte_error"])


@pytest.mark.parametrize("form", ["questions", "poems"])
def test_exact_match_is_the_share_of_recorded_answers_that_hold_what_is_wanted(form, sections, summary):
    section = sections[form]
    for group, places in groups_of(section["items"]).items():
        for name, results in section["results"].items():
            right = [is_correct(results[i]["text"], section["items"][i]["wanted"]) for i in places]
            assert summary[f"{form}.jsonl"]["exact match"][group]["models"][name] == pytest.approx(np.mean(right))


def test_groups_are_told_by_what_differs(sections):
    assert list(groups_of(sections["questions"]["items"])) == [
        *("all", "Chinese", "English", "reversed", "seen", "reversed, Chinese", "reversed, English"),
        *("seen, Chinese", "seen, English", "kind a", "kind b"),
    ]
    assert {"forward", "backward", "forward, seen in pretraining", "backward, not seen in pretraining"} <= set(
        groups_of(sections["poems"]["items"])
    )
    for section in sections.values():
        assert groups_of(section["items"])["all"] == list(range(12))


def test_the_string_named_final_is_what_is_looked_for(place, tokenizer_dir, command, undrawn):
    row = {"question": "a", "answer": "the cat sees", "final": "18"}
    Path("q.jsonl").write_text(json.dumps(row))
    given = ["--minimind-checkpoint", "ar_state_dict.pt", "--eval-data", "q.jsonl", "--tokenizer-dir", tokenizer_dir]
    given += ["--frontier-questions", "0", "--dtype", "float32", "--out", "new"]
    assert command(report, given).code == 0
    (item,) = json.loads(Path("new/report.json").read_text())["sources"][0]["items"]
    assert (item["wanted"], item["reference"]) == ("18", "the cat sees")


def test_chrf_is_that_of_the_recorded_answers(sections, summary):
    items, results = sections["open"]["items"], sections["open"]["results"][DM]
    expected = np.mean([chrf(r["text"], i["reference"]) for i, r in zip(items, results, strict=True)])
    assert summary["open.jsonl"]["chrF"]["all"]["models"][DM] == pytest.approx(expected)


@pytest.mark.parametrize("form", ["questions", "open"])
def test_figures_of_the_writing_are_those_of_describe(form, sections, summary, tokenizer):
    items, found = sections[form]["items"], summary[f"{form}.jsonl"]
    references = [Answer("", item["reference_tokens"], True) for item in items]
    for name, results in sections[form]["results"].items():
        answers = [Answer(**{k: v for k, v in r.items() if k in Answer.__dataclass_fields__}) for r in results]
        expected = describe(tokenizer, answers, references)
        for metric in ("tokens", "premature", "overrun", "longest_repeat", "forward_passes"):
            assert found[metric.replace("_", " ")]["all"]["models"][name] == pytest.approx(expected[metric][0])
        for n in (1, 2):
            assert found[f"distinct-{n}"]["all"]["models"][name] == expected[f"distinct_{n}"]


@pytest.mark.parametrize("name, kind", [(AR, "causal"), (DM, "full")])
def test_an_answer_is_that_of_generate_with_the_seed_plus_its_place(name, kind, sections, models, tokenizer):
    for i in (0, 5):
        text, made = sections["questions"]["items"][i]["question"], sections["questions"]["results"][name][i]
        prompt = Prompt(text if kind == "causal" else [{"role": "user", "content": text}])
        continuation = ContinuationConfig(NEW_TOKENS, gen_seed=11 + i)
        expected = generate(models[name], prompt, continuation, SAMPLERS[kind])
        fields = "text", "num_tokens", "ended", "num_forward_passes"
        assert [made[field] for field in fields] == [getattr(expected, field) for field in fields]


def test_the_likelihood_of_a_reference_is_that_of_the_response(sections, models, tokenizer):
    """Without the template a blank stands between question and answer, but for Chinese."""
    for item, *made in list(zip(sections["poems"]["items"], *sections["poems"]["results"].values(), strict=True))[:4]:
        first = item["reference"][0]
        blank = "" if first.isspace() or "\u4e00" <= first <= "\u9fff" else " "
        for one, name, response in ((made[0], AR, blank + item["reference"]), (made[1], DM, item["reference"])):
            question = item["question"]
            prompt = Prompt([{"role": "user", "content": question}] if name == DM else question)
            expected = response_likelihood(models[name], prompt, response, 2)
            found = one["reference_likelihood"]
            assert found["nats"] == pytest.approx(-expected["log_likelihood"], rel=1e-4)
            assert found["tokens"] == expected["tokens"]


def test_differences_are_ar_minus_diffusion_and_lie_in_their_intervals(made):
    found = 0
    for section in made[1]["sources"]:
        for row in rows_of(section, made[1]["models"]):
            for name, gap in row.differences.items():
                assert name == DM and gap.value == pytest.approx(row.values[AR].value - row.values[DM].value)
                if gap.low is not None and row.count > 3:
                    assert gap.low <= gap.value + 1e-9 and gap.value <= gap.high + 1e-9
                    found += 1
    assert found > 30


# -- frontier ----------------------------------------------------------------------------------------------------------


def test_the_frontier_has_every_policy_with_every_setting_and_ar(made, sections, models, tokenizer):
    metric, points = points_of(made[1])
    drawn = {(point.policy, point.setting) for point in points}
    adaptive = {"threshold": ["0.5", "0.7", "0.9"], "factor": ["0.5", "1", "2"], "AR": ["temperature 0.8", "greedy"]}
    assert drawn == {(p, s) for p in (*POLICIES, "AR") for s in adaptive.get(p, ["1 step", "6 steps"])}
    assert metric.name == "exact match" and len(points) == len(drawn)
    frontier = made[1]["frontier"]
    assert frontier["source"] == "poems.jsonl" and frontier["batch_size"] == 1, "the first file that has right answers"
    for point, recorded in zip(points, frontier["points"], strict=True):
        results = recorded["results"]
        assert point.passes.value == pytest.approx(np.mean([r["num_forward_passes"] for r in results]))
        right = [is_correct(r["text"], i["wanted"]) for r, i in zip(results, sections["poems"]["items"], strict=False)]
        assert point.quality.value == pytest.approx(np.mean(right)) and len(results) == 3
        if point.setting == "1 step":
            assert point.passes.value == 1
    first = next(p for p in frontier["points"] if p["policy"] == "margin")
    text = sections["poems"]["items"][1]["question"]
    config = DenoisingConfig(gen_steps=1, gen_remasking="margin")
    prompt, continuation = Prompt([{"role": "user", "content": text}]), ContinuationConfig(NEW_TOKENS, gen_seed=12)
    expected = generate(models[DM], prompt, continuation, config)
    assert first["results"][1]["text"] == expected.text


# -- the page ----------------------------------------------------------------------------------------------------------


def test_what_is_drawn_again_is_the_same_to_the_byte_wherever_it_is_drawn(made, workspace):
    folder = made[0] / "report"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}
    assert before.keys() == {"report.md", "exact_match.png", "likelihood.png", "frontier.png"}
    result = run_command(report, ["--from", folder / "report.json", "--out", "drawn/again"])
    assert result.code == 0, result.err
    assert {path.name: path.read_bytes() for path in Path("drawn/again").iterdir()} == before


def test_the_page_has_every_file_every_metric_and_where_it_comes_from(made):
    page = (made[0] / "report" / "report.md").read_text(encoding="utf-8")
    for words in ("--frontier-questions 3", "<= ", "| seed | 11 |", made[1]["tokenizer"], made[1]["torch"]):
        assert words in page
    for section in made[1]["sources"]:
        assert f"## {section['name']}" in page and section["sha256"][:12] in page
        for row in rows_of(section, made[1]["models"]):
            assert f"| {row.metric.name} | {row.group} | {row.count:,} |" in page and f"- {row.metric.name}: " in page
    assert "unedited" not in page, "answers to foreign questions are shown when asked for"
    widths = [line.count(" | ") for line in page.splitlines() if line.startswith("| exact match")]
    assert len(set(widths)) == 1


def test_a_difference_is_bold_if_its_interval_holds_no_zero_and_its_rows_are_enough():
    metric, bold = METRICS["text"][0], []
    for low, high, count in ((0.5, 1.5, 20), (0.5, 1.5, 19), (-0.5, 1.5, 20), (-1.5, -0.5, 20)):
        bold.append(report_page._difference(metric, Estimate(1.0, None, low, high), count).startswith("**"))
    assert bold == [True, False, False, True]


def test_answers_are_shown_when_asked_for_and_steer_no_page(made, workspace, monkeypatch):
    for name in ("draw_quality", "draw_likelihood", "draw_frontier"):
        monkeypatch.setattr(report_page, name, lambda *a: None)
    changed = json.loads(json.dumps(made[1]))
    questions = next(section for section in changed["sources"] if section["format"] == "questions")
    questions["results"][AR][0]["text"] = "a|b\n\x1b[2J *c*"
    Path("report.json").write_text(json.dumps(changed), encoding="utf-8")
    assert run_command(report, ["--from", "report.json", "--show", "12"]).code == 0
    page = Path("report.md").read_text(encoding="utf-8")
    assert "a\\|b / " in page and "\x1b" not in page and "\\*c\\*" in page


def test_one_kind_alone_has_no_differences(place, tokenizer_dir, command, undrawn):
    given = [*BOTH[2:], *flags(tokenizer_dir, "--eval-data", "questions.jsonl,text.jsonl", "--out", "one")]
    given = [*given, "--frontier-questions", "0"]
    del given[given.index("--canvas") : given.index("--canvas") + 2]
    assert command(report, given).code == 0
    found = json.loads(Path("one/report.json").read_text(encoding="utf-8"))
    assert [model["kind"] for model in found["models"]] == [DIFFUSION] and found["frontier"] is None
    assert all(not row.differences for section in found["sources"] for row in rows_of(section, found["models"]))


def test_main_returns_the_summary(made, summary, workspace, undrawn):
    found = report.main(["--from", str(made[0] / "report" / "report.json"), "--out", "again"])
    assert found == summary
    nats = found["text.jsonl"]["nats per token"]["all"]["models"]
    assert found["text.jsonl"]["perplexity"]["all"]["models"] == {
        n: pytest.approx(math.exp(v)) for n, v in nats.items()
    }


def test_without_files_the_bundled_rows_are_asked_and_what_training_held_out_is_scored(
    place, tokenizer_dir, command, monkeypatch
):
    rows = {"questions": questions()[:9], "choices": choices()[:9], "pretrain": ROWS["text"], "sft": ROWS["chat"]}
    for name, some in rows.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
        Path(f"{name}.jsonl").write_text(lines, encoding="utf-8")
    monkeypatch.setattr(report_items, "bundled_file", lambda name: Path(f"{name}.jsonl"))
    more = ["--val-fraction", "0.4", "--frontier-questions", "0", "--seq-len", "200", "--out", "new"]
    assert command(report, [*BOTH, *flags(tokenizer_dir), *more]).code == 0
    found = json.loads(Path("new/report.json").read_text(encoding="utf-8"))["sources"]
    assert [section["format"] for section in found] == ["questions", "choices", "text", "chat"]
    assert all(section["bundled"] and section["format"] == form_of(Path(section["path"])) for section in found)
    held_out = [text for row in ROWS["text"] if is_validation(text := row["text"], 0.4)]
    assert 0 < len(held_out) < 12
    assert sorted(item["bytes"] for item in found[2]["items"]) == sorted(len(text.encode()) for text in held_out)
    told = [messages for _, messages in read_conversations(Path("sft.jsonl"))]
    kept = [messages for messages in told if is_validation(render_chat(messages, False), 0.4)]
    replies = [[m["content"] for m in messages if m["role"] == "assistant"] for messages in kept]
    assert 0 < len(kept) < len(told)
    assert sorted(item["bytes"] for item in found[3]["items"]) == sorted(len("".join(r).encode()) for r in replies)
    page = Path("new/report.md").read_text(encoding="utf-8")
    assert page.count("Answers, unedited") == 1 and "of which those that training held out" in page


def test_models_of_blocks_stand_beside_the_others(place, tokenizer, tokenizer_dir, command, monkeypatch):
    """Named, scored by all their masks, decoded in their blocks, and a line of the frontier each."""
    for name in ("draw_quality", "draw_likelihood", "draw_frontier"):
        monkeypatch.setattr(report_page, name, lambda *a: None)
    for size in (1, 3):
        model, path = untrained(tokenizer, f"block {size}"), Path(f"b{size}_state_dict.pt")
        save_checkpoint(path, model.config, model.state_dict(), tokenizer=fingerprint(tokenizer), stage="sft")
    argv = [*BOTH[:-1], "dm_state_dict.pt,b1_state_dict.pt,b3_state_dict.pt", *flags(tokenizer_dir), "--max-rows", "3"]
    argv += ["--eval-data", "text.jsonl,chat.jsonl,questions.jsonl", "--frontier-questions", "1", "--out", "new"]
    argv += ["--frontier-steps", "1", "--frontier-thresholds", "0.9", "--frontier-factors", "1"]
    said = command(report, argv)
    assert said.code == 0, said.err
    found, page = (Path(f"new/report.{kind}").read_text(encoding="utf-8") for kind in ("json", "md"))
    found = json.loads(found)
    names = [model["name"] for model in found["models"]]
    assert names == [AR, DM, "diffusion b1", "diffusion b3"]
    assert [(m["attention"], m["block_size"]) for m in found["models"]] == [
        *(("causal", 0), ("full", 0), ("block", 1), ("block", 3))
    ]
    for section in found["sources"][:2]:
        assert [all(r["variance"] == 0 for r in section["results"][name]) for name in names] == [
            True,
            False,
            True,
            True,
        ]
    assert list(dict.fromkeys(point["model"] for point in found["frontier"]["points"])) == names
    for words in ("| diffusion b3 | blocks of 3 |", "2 masks drawn per row; all masks of blocks of up to 4 tokens"):
        assert words in page
    assert "; diffusion (full): nothing is kept" in page and "; diffusion (blocks of 3): keys and values of f" in page
    (nats,) = [line for line in page.splitlines() if line.startswith("| nats per token | all | 3 |")][:1]
    assert [cell.strip().startswith("<= ") for cell in nats.split("|")[4:8]] == [False, True, False, True]
    assert "| diffusion b1 answers | " in page and "blocks of 3 tokens from left to right" in page
