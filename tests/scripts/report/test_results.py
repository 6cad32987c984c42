"""Every number of the report, computed another way from what is recorded."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dataset.rows.exercise_formats import exercise_of
from dataset.tokenizer import encode
from scripts.engine.decoding.answers import Answer, describe
from scripts.engine.report.exercises import item_of
from scripts.engine.report.metrics import EXACT, WRITTEN
from scripts.engine.report.results import difference, groups_of, reversals_of, rows_of
from scripts.engine.statistics import chrf, is_correct, paired_interval, resampled_sums, wilson
from scripts.eval import likelihood, report
from tests.scripts.report.conftest import AR, DM, LENGTH

# -- likelihood --------------------------------------------------------------------------------------------------------

FIELDS = {"nats_per_token": "nats per token", "perplexity": "perplexity", "bits_per_byte": "bits per byte"}
ERRORS = {"standard_error": "nats per token", "bits_per_byte_error": "bits per byte"}


@pytest.mark.parametrize("name, kind", [(AR, "ar"), (DM, "dm")])
@pytest.mark.parametrize("form", ["text", "chat", "choices"])
def test_what_is_recorded_sums_to_the_numbers_of_the_likelihood_command(
    form, name, kind, place, tokenizer_dir, rows, command
):
    argv = ["--checkpoint", f"{kind}_state_dict.pt", "--eval-data", f"{form}.jsonl", "--json", "l.json"]
    argv += ["--tokenizer-dir", tokenizer_dir, "--dtype", "float32", "--device", "cpu", "--seed", "11"]
    argv += ["--seq-len", LENGTH, *(("--nmc", "2") if kind == "dm" else ())]
    argv += ["--canvas", "12"] if (kind, form) == ("dm", "chat") else []
    assert command(likelihood, argv).code == 0
    key, count = ("accuracy", "questions") if form == "choices" else ("likelihood", "documents")
    languages = {"all": "all", "zh": "Chinese", "other": "English and other"}
    for language, expected in json.loads(Path("l.json").read_text())[key].items():
        for field, metric in ({"acc": "acc", "acc_norm": "acc_norm"} if form == "choices" else FIELDS).items():
            row = rows[f"{form}.jsonl", metric, languages[language]]
            assert row.values[name].value == pytest.approx(expected[field], rel=1e-12)
            assert row.count == expected[count]
        for field, metric in ({} if form == "choices" else ERRORS).items():
            error = rows[f"{form}.jsonl", metric, languages[language]].values[name].error
            assert error == (None if expected[field] is None else pytest.approx(expected[field]))


def test_the_error_of_a_perplexity_is_that_of_the_nats_times_the_perplexity(rows):
    nats, perplexity = (rows["text.jsonl", metric, "all"].values for metric in ("nats per token", "perplexity"))
    for name in (AR, DM):
        assert perplexity[name].value == pytest.approx(math.exp(nats[name].value))
        assert perplexity[name].error == pytest.approx(nats[name].error * perplexity[name].value)


def test_a_difference_of_perplexities_lies_in_its_interval(rows):
    gap = rows["text.jsonl", "perplexity", "all"].differences[DM]
    assert gap.low < gap.value < gap.high
    assert gap.high - gap.low > 10, "as wide as perplexities of hundreds are, not as nats"


@pytest.mark.parametrize("form", ["poems", "open"])
def test_nats_of_the_given_answers_are_all_of_theirs_by_all_of_their_tokens(form, sections, rows):
    row = rows[f"{form}.jsonl", "nats per token of the given answer", "all"]
    for name, results in sections[form]["results"].items():
        scored = [r["reference_likelihood"] for r in results if "reference_likelihood" in r]
        assert row.count == len(scored) > 0 and len({given["tokens"] for given in scored}) > 1
        expected = sum(given["nats"] for given in scored) / sum(given["tokens"] for given in scored)
        assert row.values[name].value == pytest.approx(expected)


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["questions", "poems"])
def test_exact_match_is_the_share_of_recorded_answers_that_hold_what_is_wanted(form, sections, summary):
    section = sections[form]
    for group, places in groups_of(section["items"]).items():
        for name, results in section["results"].items():
            right = [
                is_correct(results[i]["text"], section["items"][i]["wanted"], section["items"][i]["question"])
                for i in places
            ]
            assert summary[f"{form}.jsonl"]["exact match"][group]["models"][name] == pytest.approx(np.mean(right))


def test_answers_with_one_form_are_right_as_a_whole_and_their_distance_is_told_for_each_kind(tokenizer):
    answers = [(kind, f"{number}, {number + 1}, {number + 2}.") for kind in ("count", "sort") for number in range(5)]
    rows = [{"question": "?", "answer": answer, "kind": kind, "match": "whole"} for kind, answer in answers]
    rows.append({"question": "?", "answer": "cat", "kind": "other"})
    items = [item_of(exercise_of(row, "questions"), tokenizer) for row in rows]

    def told(texts):
        cost = {"ids": [1], "num_tokens": 1, "ended": True, "num_forward_passes": 1, "seconds": 1.0}
        results = [{"text": text} | cost for text in texts]
        section = {"format": "questions", "batch_size": 1, "items": items, "results": {AR: results}}
        return {
            (row.metric.name, row.group): row.values[AR].value for row in rows_of(section, [{"name": AR, "kind": "AR"}])
        }

    perfect = told([row["answer"] for row in rows])
    assert [perfect["exact match", group] for group in ("all", "kind count", "kind sort")] == [1, 1, 1]
    assert [perfect["edit distance", group] for group in ("all", "kind count", "kind sort")] == [0, 0, 0]
    damaged = told([row["answer"] if row["kind"] == "sort" else f"{row['answer']} {row['answer']}" for row in rows])
    assert (damaged["exact match", "kind count"], damaged["exact match", "kind sort"]) == (0, 1)
    assert (damaged["edit distance", "kind count"], damaged["edit distance", "all"]) == pytest.approx((9 / 17, 9 / 34))
    assert damaged["exact match", "kind other"] == 1 and ("edit distance", "kind other") not in damaged
    assert told(["" for _ in rows])["edit distance", "all"] == 1


def test_chrf_is_that_of_the_recorded_answers(sections, summary):
    items, results = sections["open"]["items"], sections["open"]["results"][DM]
    expected = np.mean([chrf(r["text"], i["reference"]) for i, r in zip(items, results, strict=True)])
    assert summary["open.jsonl"]["chrF"]["all"]["models"][DM] == pytest.approx(expected)


@pytest.mark.parametrize("form", ["questions", "open"])
def test_figures_of_the_writing_are_those_of_describe(form, sections, rows, tokenizer):
    references = [Answer("", item["reference_tokens"], True) for item in sections[form]["items"]]
    for name, results in sections[form]["results"].items():
        answers = [Answer(**{field: result[field] for field in WRITTEN}) for result in results]
        expected = describe(tokenizer, answers, references)
        for metric in ("tokens", "premature", "overrun", "longest_repeat", "forward_passes"):
            estimate = rows[f"{form}.jsonl", metric.replace("_", " "), "all"].values[name]
            assert estimate.value == pytest.approx(expected[metric][0])
        for n in (1, 2):
            assert rows[f"{form}.jsonl", f"distinct-{n}", "all"].values[name].value == expected[f"distinct_{n}"]


def test_edits_are_told_of_every_model_if_one_edits(made, sections):
    section, models = sections["questions"], made[1]["models"]
    assert not [row for row in rows_of(section, models) if row.metric.name == "edits"]
    counts = {AR: [0] * len(section["items"]), DM: [i % 4 for i in range(len(section["items"]))]}
    results = {
        name: [result | {"num_edits": n} for result, n in zip(section["results"][name], counts[name], strict=True)]
        for name in counts
    }
    told = [row for row in rows_of({**section, "results": results}, models) if row.metric.name == "edits"]
    assert {name: told[0].values[name].value for name in counts} == {name: np.mean(n) for name, n in counts.items()}


def test_distinct_n_grams_of_a_language_are_counted_among_its_answers(sections, rows, tokenizer):
    pairs = zip(sections["questions"]["items"], sections["questions"]["results"][DM], strict=True)
    ids = [token for item, r in pairs if item["lang"] == "zh" for token in encode(tokenizer, r["text"])]
    assert rows["questions.jsonl", "distinct-1", "Chinese"].values[DM].value == len(set(ids)) / len(ids)


def test_the_time_of_a_batch_has_no_error(rows):
    row = rows["questions.jsonl", "seconds", "all"]
    assert all(one.error is one.low is None for one in (*row.values.values(), *row.differences.values()))


# -- groups ------------------------------------------------------------------------------------------------------------


def test_groups_are_told_by_what_differs(sections):
    assert list(groups_of(sections["questions"]["items"])) == [
        *("all", "Chinese", "English", "reversed", "seen", "reversed, Chinese", "reversed, English"),
        *("seen, Chinese", "seen, English", "kind a", "kind b"),
    ]
    for section in sections.values():
        assert groups_of(section["items"])["all"] == list(range(12))


def test_rows_seen_in_pretraining_are_told_from_those_that_were_not(sections, rows):
    for words, value in (("seen", "True"), ("not seen", "False")):
        number = sum((i["direction"], i["seen_in_pretrain"]) == ("forward", value) for i in sections["poems"]["items"])
        assert rows["poems.jsonl", "exact match", f"forward, {words} in pretraining"].count == number


def test_a_value_called_as_another_group_is_replaces_none_and_costs_are_told_of_every_language(made, sections):
    items = [
        item | {"lang": ("en", "de", "zh")[i % 3], "split": ("all", "English")[i % 2]}
        for i, item in enumerate(sections["questions"]["items"])
    ]
    groups = groups_of(items)
    assert groups["all"] == list(range(12)) and groups["split all"] == list(range(0, 12, 2))
    assert groups["English"] == [0, 3, 6, 9] and groups["split English"] == list(range(1, 12, 2))
    table = rows_of({**sections["questions"], "items": items}, made[1]["models"])
    for metric in ("tokens", "distinct-1"):
        assert {row.group for row in table if row.metric.name == metric} == {"all", "Chinese", "English", "de"}


# -- intervals and differences -----------------------------------------------------------------------------------------


def test_the_interval_of_a_share_is_wilsons_of_the_rows_of_its_group(rows):
    for row in (row for row in rows.values() if row.metric.share):
        for estimate in row.values.values():
            low, high = wilson(estimate.value, row.count)
            assert (estimate.low, estimate.high) == pytest.approx((max(low, 0), min(high, 1)))


def test_differences_are_ar_minus_diffusion_and_lie_in_their_intervals(rows):
    intervals = 0
    for row in rows.values():
        for name, gap in row.differences.items():
            assert name == DM and gap.value == pytest.approx(row.values[AR].value - row.values[DM].value)
            if gap.low is not None and row.count > 3:
                assert gap.low - 1e-9 <= gap.value <= gap.high + 1e-9
                intervals += 1
    assert intervals > 30


def test_a_model_and_its_double_differ_by_nothing_whatever_rows_are_drawn(made):
    for section in made[1]["sources"]:
        double = {**section, "results": dict.fromkeys((AR, DM), section["results"][AR])}
        for row in rows_of(double, made[1]["models"]):
            for gap in row.differences.values():
                assert (gap.value, gap.low or 0, gap.high or 0) == pytest.approx((0, 0, 0), abs=1e-9)


def test_rows_that_no_resample_tells_apart_have_no_interval():
    wrong, one = (np.stack([right, np.ones(80)], axis=1) for right in (np.zeros(80), np.arange(80) == 3))
    assert difference(EXACT, wrong, wrong, resampled_sums(np.hstack([wrong, wrong]))) == (0, None, None, None)
    other = difference(EXACT, one, wrong, resampled_sums(np.hstack([one, wrong])))
    assert (other.low, other.value) == (0, 1 / 80) and other.high > 1 / 80


def test_main_returns_the_summary(made, summary, workspace, undrawn):
    assert report.main(["--from", str(made[0] / "report" / "report.json"), "--out", "again"]) == summary


# -- poems in both directions ------------------------------------------------------------------------------------------


def couplets(number: int, seed: int) -> tuple[dict, np.ndarray, np.ndarray]:
    """A section of `number` couplets in random order and one row alone; (number, 2) right answers, and (number, 2, 2)
    nats and tokens."""
    draw = np.random.default_rng(seed)
    right, nats = draw.integers(0, 2, (number, 2)), draw.uniform(1, 9, (number, 2))
    tokens = draw.integers(2, 9, (number, 2))
    wanted = {"question": "?", "reference": "a", "wanted": "a"}
    pairs = [({"couplet": "x", "direction": "forward", **wanted}, {"text": "a"})]
    for i in range(number):
        for way, direction in enumerate(("forward", "backward")):
            likelihood = {"nats": nats[i, way], "tokens": int(tokens[i, way])}
            item = {"couplet": str(i), "direction": direction, **wanted}
            pairs.append((item, {"text": "ba"[right[i, way]], "reference_likelihood": likelihood}))
    items, results = zip(*(pairs[i] for i in draw.permutation(len(pairs))), strict=True)
    return {"format": "poems", "items": items, "results": {AR: results}}, right, np.stack([nats, tokens], axis=2)


def test_forward_minus_backward_is_paired_by_couplet():
    section, right, nats = couplets(40, 0)
    exact, likelihood = reversals_of(section, [{"name": AR}])
    assert (exact.metric.name, exact.model, exact.count) == ("exact match", AR, 40)
    assert (exact.forward, exact.backward) == pytest.approx(tuple(right.mean(axis=0)))
    assert exact.difference.value == pytest.approx(right[:, 0].mean() - right[:, 1].mean())
    totals = nats.sum(axis=0)
    assert (likelihood.forward, likelihood.backward) == pytest.approx(tuple(totals[:, 0] / totals[:, 1]))
    order = [int(c) for c in dict.fromkeys(item["couplet"] for item in section["items"]) if c != "x"]
    for reversal, columns in ((exact, np.stack([right, np.ones_like(right)], axis=2)), (likelihood, nats)):
        expected = paired_interval(columns[order, 0].astype(float), columns[order, 1].astype(float))
        assert (reversal.difference.low, reversal.difference.high) == pytest.approx(expected)


def test_couplets_equally_hard_in_both_directions_leave_a_narrow_interval():
    """Unpaired, 40 couplets of which half are known would leave one of half of all."""
    section, _, _ = couplets(40, 1)
    for item, result in zip(section["items"], section["results"][AR], strict=True):
        result["text"] = "a" if item["couplet"] in map(str, range(20)) else "b"
    exact = reversals_of(section, [{"name": AR}])[0]
    assert exact.difference == (0, None, None, None) and exact.forward == 0.5
