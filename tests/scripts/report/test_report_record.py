"""The report against its own record: intervals, errors, frontier, pictures and provenance, computed another way."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from dataset.tokenizer import encode
from model.decode import ContinuationConfig, DenoisingConfig, SamplingConfig
from model.remasking import POLICIES
from scripts.engine.loaded import load_for_use
from scripts.engine.prompts import PromptConfig
from scripts.engine.report import figures as report_figures
from scripts.engine.report import frontier as report_frontier
from scripts.engine.report import page as report_page
from scripts.engine.report.frontier import FrontierConfig, measure_frontier
from scripts.engine.report.measure import MeasureConfig, Setup, answers_of
from scripts.engine.report.results import EXACT, difference, groups_of, is_right, points_of, rows_of
from scripts.engine.report.sampling import sampling_of
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.statistics import resampled_sums, wilson
from scripts.eval import report
from tests.scripts.report.test_report import AR, DM, RUNTIME, made  # noqa: F401 (a fixture)


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


def test_the_frontier_is_compared_with_ar_as_it_is_set_and_measured_one_at_a_time(made):  # noqa: F811
    _, points = points_of(made[1])
    assert (points[0].policy, points[0].difference) == ("AR", None)
    for point, recorded in zip(points, made[1]["frontier"]["points"], strict=True):
        tokens, seconds = (sum(r[name] for r in recorded["results"]) for name in ("num_tokens", "seconds"))
        assert point.tokens_per_second == pytest.approx(tokens / seconds)
        if point.difference is not None:
            assert point.difference.value == pytest.approx(points[0].quality.value - point.quality.value)
    assert made[1]["frontier"]["batch_size"] == 1 and made[1]["settings"]["batch_size"] is None


@pytest.fixture
def setup(made, tokenizer):  # noqa: F811
    """The models of the report, their questions seeded to the last seed there is."""
    loaded = {
        name: load_for_use(made[0] / f"{stem}_state_dict.pt", tokenizer, 64, RUNTIME)
        for name, stem in ((AR, "ar"), (DM, "dm"))
    }
    sampling = SamplingConfig(), DenoisingConfig(gen_steps=2)
    continuation = ContinuationConfig(6, gen_seed=2**32 - 1)
    return Setup(loaded, tokenizer, MeasureConfig(64), PromptConfig(), continuation, *sampling, RUNTIME)


def test_a_question_is_answered_by_all_samplers_before_the_next_is_and_as_if_it_were_alone(setup, made, monkeypatch):  # noqa: F811
    section = next(section for section in made[1]["sources"] if section["format"] == "questions")
    order, answer_batch = [], report_frontier.answer_batch

    def noted(loaded, prompts, continuation, sampler):
        order.append((continuation.gen_seed, len(prompts)))
        return answer_batch(loaded, prompts, continuation, sampler)

    monkeypatch.setattr(report_frontier, "answer_batch", noted)
    found = measure_frontier(setup, FrontierConfig(4, "2", "0.9", "1"), section)
    number = len(found["points"])
    assert [point["policy"] for point in found["points"]] == ["AR", "AR", *POLICIES]
    first = (2**32 - 1) % (2**32 - 4)
    assert order == [(first + place, 1) for place in range(4) for _ in range(number)]
    for point in found["points"]:
        if point["policy"] in ("AR", "random") and point["setting"] != "greedy":
            config = replace(setup.denoising, gen_remasking="random") if point["policy"] == "random" else setup.sampling
            alone = answers_of(setup, point["model"], section["items"][:4], config, 1)
            assert [answer["text"] for answer in point["results"]] == [answer["text"] for answer in alone]
            assert len({answer["text"] for answer in alone}) > 1


def test_rows_that_no_resample_tells_apart_have_no_interval():
    wrong, one = (np.stack([right, np.ones(80)], axis=1) for right in (np.zeros(80), np.arange(80) == 3))
    equal = difference(EXACT, wrong, wrong, resampled_sums(np.hstack([wrong, wrong])))
    assert equal == (0, None, None, None) and report_page._difference(EXACT, equal, 80) == "+0.000"
    other = difference(EXACT, one, wrong, resampled_sums(np.hstack([one, wrong])))
    assert (other.low, other.value) == (0, 1 / 80) and other.high > 1 / 80


def test_a_value_called_as_another_group_is_replaces_none_and_costs_are_told_of_every_language(made):  # noqa: F811
    section = next(section for section in made[1]["sources"] if section["format"] == "questions")
    items = [
        item | {"lang": ("en", "de", "zh")[i % 3], "split": ("all", "English")[i % 2]}
        for i, item in enumerate(section["items"])
    ]
    groups = groups_of(items)
    assert groups["all"] == list(range(12)) and groups["split all"] == list(range(0, 12, 2))
    assert groups["English"] == [0, 3, 6, 9] and groups["split English"] == list(range(1, 12, 2))
    found = rows_of({**section, "items": items}, made[1]["models"])
    assert {row.group for row in found if row.metric.name == "tokens"} == {"all", "Chinese", "English", "de"}
    assert {row.group for row in found if row.metric.name == "distinct-1"} == {"all", "Chinese", "English", "de"}


@pytest.mark.parametrize("form", ["poems", "open"])
def test_nats_of_the_given_answers_are_all_of_theirs_by_all_of_their_tokens(form, made, rows):  # noqa: F811
    section = next(section for section in made[1]["sources"] if section["format"] == form)
    row = rows[f"{form}.jsonl", "nats per token of the given answer", "all"]
    for name, results in section["results"].items():
        found = [r["reference_likelihood"] for r in results if "reference_likelihood" in r]
        assert row.count == len(found) > 0 and len({one["tokens"] for one in found}) > 1
        expected = sum(one["nats"] for one in found) / sum(one["tokens"] for one in found)
        assert row.values[name].value == pytest.approx(expected)


def test_pictures_have_no_kinds_and_call_the_only_model_of_a_kind_by_it(made, figures):  # noqa: F811
    drawn = {s["name"]: rows_of(s, made[1]["models"]) for s in made[1]["sources"]}
    axis = report_figures.draw_quality(made[1], {"questions.jsonl": drawn["questions.jsonl"]}).axes[0]
    labels = [label.get_text().rpartition(" (")[0] for label in axis.get_yticklabels()]
    assert {"all", "Chinese", "seen", "seen, Chinese"} <= set(labels) and not any("kind" in one for one in labels)
    assert axis.get_legend_handles_labels()[1] == ["AR", "diffusion"]
    more = {**made[1], "models": [*made[1]["models"], made[1]["models"][0] | {"name": "AR two"}]}
    assert list(report_figures._short(more).values()) == [AR, "diffusion", "AR two"]


def test_the_page_says_how_answers_were_sampled(made):  # noqa: F811
    page = (made[0] / "report" / "report.md").read_text(encoding="utf-8")
    (ar,), (diffusion,) = (
        [line for line in page.splitlines() if line.startswith(f"| {kind} answers |")] for kind in ("AR", "diffusion")
    )
    for words in ("temperature 0.8, top-k 8", "repetition penalty 0.15 within 128 tokens", "at most 6 new tokens"):
        assert words in ar
    for words in ("policy low_confidence", "4 steps", "one block", "canvas of 6 masked tokens", "temperature 0.8"):
        assert words in diffusion
    settings = made[1]["settings"] | {"ar_temperature": 0.0, "gen_remasking": "factor", "gen_factor": 2.0}
    settings |= {"gen_block_size": 3, "gen_cap_start_ratio": 0.2, "gen_max_decode_per_step": 5, "gen_steps": 1}
    other = {**made[1], "settings": settings}
    ar, diffusion = made[1]["models"]
    assert "temperature 0)" in sampling_of(other, ar)
    for words in ("factor 2, keeping at most 0.2 to 0.5 ", "and 5 tokens", "1 step;", "blocks of 3 tokens"):
        assert words in sampling_of(other, diffusion)


def test_help_says_which_file_the_frontier_is_of(command):
    assert "the first file with right and wrong answers" in " ".join(command(report, ["--help"]).out.split())


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
    shown = [row for row in drawn["questions.jsonl"] if row.metric.name == "exact match" and "kind" not in row.group]
    expected = [row.values[name].value for name in (AR, DM) for row in shown]
    assert [bar.get_width() for bar in panel.patches] == pytest.approx(expected)
    labels = report_figures.draw_likelihood(made[1], drawn).axes[0].get_legend_handles_labels()[1]
    assert labels == ["AR", "diffusion, upper bound"]
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
