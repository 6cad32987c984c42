"""The report against its own record: intervals, errors, frontier, pictures and provenance, computed another way."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from dataset.tokenizer import encode
from scripts.engine import report_figures, report_frontier, report_page
from scripts.engine.choices import wilson
from scripts.engine.report_frontier import FrontierConfig, measure_frontier
from scripts.engine.report_results import is_right, points_of, rows_of
from scripts.engine.runtime import RuntimeConfig
from scripts.eval import report
from tests.scripts.test_report import AR, DM, made  # noqa: F401 (a fixture)


@pytest.fixture
def rows(made):  # noqa: F811
    """(file, metric, group) -> row."""
    found = {s["name"]: rows_of(s, made[1]["models"]) for s in made[1]["sources"]}
    return {(name, row.metric.name, row.group): row for name, some in found.items() for row in some}


@pytest.fixture
def figures(monkeypatch):
    """Figures, before they become bytes."""
    monkeypatch.setattr(report_figures, "_png", lambda figure: figure)


def test_the_interval_of_a_share_is_wilsons_of_the_rows_of_its_group(rows):
    for row in (row for row in rows.values() if row.metric.share):
        for found in row.values.values():
            low, high = wilson(found.value, row.count)
            assert (found.low, found.high) == pytest.approx((max(low, 0), min(high, 1)))


def test_the_error_of_a_perplexity_is_that_of_the_nats_times_the_perplexity(rows):
    nats, perplexity = (rows["text.jsonl", metric, "all"].values for metric in ("nats per token", "perplexity"))
    for name in (AR, DM):
        assert perplexity[name].error == pytest.approx(nats[name].error * perplexity[name].value)


def test_the_time_of_a_batch_has_no_error(rows):
    row = rows["questions.jsonl", "seconds", "all"]
    assert all(one.error is one.low is None for one in (*row.values.values(), *row.differences.values()))


def test_rows_seen_in_pretraining_are_told_from_those_that_were_not(made, rows):  # noqa: F811
    items = next(section["items"] for section in made[1]["sources"] if section["format"] == "poems")
    for told, value in (("seen", "True"), ("not seen", "False")):
        number = sum((i["direction"], i["seen_in_pretrain"]) == ("forward", value) for i in items)
        assert rows["poems.jsonl", "exact match", f"forward, {told} in pretraining"].count == number


def test_distinct_n_grams_of_a_language_are_counted_among_its_answers(made, rows, tokenizer):  # noqa: F811
    section = next(section for section in made[1]["sources"] if section["format"] == "questions")
    pairs = zip(section["items"], section["results"][DM], strict=True)
    ids = [token for item, r in pairs if item["lang"] == "zh" for token in encode(tokenizer, r["text"])]
    assert rows["questions.jsonl", "distinct-1", "Chinese"].values[DM].value == len(set(ids)) / len(ids)


def test_the_frontier_is_compared_with_ar_as_it_is_set_and_measured_one_at_a_time(made, monkeypatch):  # noqa: F811
    _, points = points_of(made[1])
    assert (points[0].policy, points[0].difference) == ("AR", None)
    for point, recorded in zip(points, made[1]["frontier"]["points"], strict=True):
        tokens, seconds = (sum(r[name] for r in recorded["results"]) for name in ("num_tokens", "seconds"))
        assert point.tokens_per_second == pytest.approx(tokens / seconds)
        if point.difference is not None:
            assert point.difference.value == pytest.approx(points[0].quality.value - point.quality.value)
    sizes = []
    monkeypatch.setattr(report_frontier, "answers_of", lambda *a: sizes.append(a[-1]) or [])
    model = type("Model", (), {"config": type("Config", (), {"attention": "causal"})})
    setup = type(
        "Setup",
        (),
        {
            "models": {AR: type("Loaded", (), {"model": model})},
            "config": report.MeasureConfig(),
            "continuation": report.ContinuationConfig(6),
            "sampler": lambda self, name: report.SamplingConfig(),
        },
    )
    measure_frontier(setup(), FrontierConfig(), {"name": "q", "items": [{}], "format": "questions"})
    assert sizes == [1, 1]


def test_a_comparison_with_ar_as_it_is_set_survives_a_greedy_that_answers_otherwise(made):  # noqa: F811
    """Greedy decoding's answers, made right, move its own point alone."""
    changed = {**made[1], "frontier": {**made[1]["frontier"]}}
    items = next(s["items"] for s in changed["sources"] if s["name"] == changed["frontier"]["source"])
    changed["frontier"]["points"] = [
        point
        if (point["policy"], point["setting"]) != ("AR", "greedy")
        else point | {"results": [r | {"text": i["wanted"]} for r, i in zip(point["results"], items, strict=False)]}
        for point in changed["frontier"]["points"]
    ]
    for before, after in zip(points_of(made[1])[1], points_of(changed)[1], strict=True):
        assert before.difference == after.difference or after.setting == "greedy"
        if after.setting == "greedy":
            assert after.quality.value == 1
            assert after.difference.value == points_of(changed)[1][0].quality.value - 1


def test_bars_and_points_stand_where_the_numbers_say(made, figures):  # noqa: F811
    drawn = {s["name"]: rows_of(s, made[1]["models"]) for s in made[1]["sources"]}
    panel = report_figures.draw_quality(made[1], {"questions.jsonl": drawn["questions.jsonl"]}).axes[0]
    shown = [row for row in drawn["questions.jsonl"] if row.metric.name == "exact match"]
    expected = [row.values[name].value for name in (AR, DM) for row in shown]
    assert [bar.get_width() for bar in panel.patches] == pytest.approx(expected)
    labels = report_figures.draw_likelihood(made[1], drawn).axes[0].get_legend_handles_labels()[1]
    assert labels == [AR, f"{DM}, upper bound"]
    found = points_of(made[1])
    axes = report_figures.draw_frontier(made[1], found).axes
    for axis, cost in zip(axes, ("passes", "seconds"), strict=True):
        places = np.sort([x for drawn in axis.containers for x in drawn.lines[0].get_xdata()])
        assert places == pytest.approx(np.sort([getattr(point, cost).value for point in found[1]]))


def test_a_bound_is_marked_for_diffusion_alone(made):  # noqa: F811
    page = (made[0] / "report" / "report.md").read_text(encoding="utf-8")
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| nats per token |")]
    assert lines and all("<=" not in cells[3] and cells[4].startswith("<= ") for cells in lines)


def test_the_record_says_which_files_were_measured_and_how_they_were_asked(made):  # noqa: F811
    for model, name, wrap in zip(made[1]["models"], ("ar", "dm"), (False, True), strict=True):
        content = (made[0] / f"{name}_state_dict.pt").read_bytes()
        assert (model["sha256"], model["chat_wrap"]) == (hashlib.sha256(content).hexdigest(), wrap)


def test_models_of_one_name_are_told_apart_by_their_folders(monkeypatch):
    monkeypatch.setattr(report, "load_kind", lambda *a: None)
    request = report.Request("a/m.pt,b/m.pt,b/n_state_dict.pt")
    names = list(report.load_all(request, None, 8, RuntimeConfig(device="cpu")))
    assert names == ["AR a/m.pt", "AR b/m.pt", "AR n"]


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "report.json"
    path.write_text("before")

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(report_page.os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        report_page.write_whole(Path(path), b"half")
    assert path.read_text() == "before"


def test_a_worked_answer_is_right_by_its_last_number_alone():
    item = {"wanted": "18", "reference": "9 * 2 = 18"}
    assert is_right(item, "9 * 2 = $18.") and is_right({**item, "wanted": "1800"}, "It is 1,800.00 in all.")
    assert not is_right(item, "18 - 3 = 15") and not is_right(item, "$18.50") and not is_right(item, "none")
    assert is_right({"wanted": "18", "reference": "18"}, "18 of 20")


def test_a_picture_of_an_earlier_report_does_not_stay(made, tmp_path, monkeypatch):  # noqa: F811
    for name in ("draw_quality", "draw_likelihood", "draw_frontier"):
        monkeypatch.setattr(report_page, name, lambda *a: None)
    (tmp_path / "frontier.png").write_bytes(b"old")
    report_page.draw(made[1], tmp_path, None)
    assert not (tmp_path / "frontier.png").exists()


def test_a_model_and_its_double_differ_by_nothing_whatever_rows_are_drawn(made):  # noqa: F811
    for section in made[1]["sources"]:
        double = {**section, "results": dict.fromkeys((AR, DM), section["results"][AR])}
        for row in rows_of(double, made[1]["models"]):
            for found in row.differences.values():
                assert (found.value, found.low or 0, found.high or 0) == pytest.approx((0, 0, 0), abs=1e-9)


def test_a_difference_of_perplexities_lies_in_its_interval(rows):
    found = rows["text.jsonl", "perplexity", "all"].differences[DM]
    assert found.low < found.value < found.high
    assert found.high - found.low > 10, "as wide as perplexities of hundreds are, not as nats"
