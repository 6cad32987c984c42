"""report.md and its figures: drawn from report.json alone, and saying what it holds."""

import json
from pathlib import Path

import numpy as np
import pytest

from model.decoding.decode import ContinuationConfig
from model.decoding.denoiser import DenoisingConfig
from scripts.engine.decoding.generation import generate
from scripts.engine.prompts import Prompt
from scripts.engine.report import figures, page
from scripts.engine.report.metrics import EXACT, NATS
from scripts.engine.report.results import Estimate, points_of, titles_of
from scripts.eval import report
from tests.scripts.conftest import run_command
from tests.scripts.report.conftest import AR, DM


def test_what_is_drawn_again_is_the_same_to_the_byte_wherever_it_is_drawn(made, workspace):
    folder = made[0] / "report"
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "report.json"}
    assert before.keys() == {"report.md", "exact_match.png", "likelihood.png", "frontier.png"}
    result = run_command(report, ["--from", folder / "report.json", "--out", "drawn/again"])
    assert result.code == 0, result.err
    assert {path.name: path.read_bytes() for path in Path("drawn/again").iterdir()} == before


def test_the_page_has_every_file_every_metric_and_where_it_comes_from(made, markdown, tables):
    for words in ("--frontier-questions 3", "<= ", "| seed | 11 |", made[1]["tokenizer"], made[1]["torch"]):
        assert words in markdown
    for section in made[1]["sources"]:
        assert f"## {section['name']}" in markdown and section["sha256"][:12] in markdown
        for row in tables[section["name"]]:
            assert f"| {row.metric.name} | {row.group} | {row.count:,} |" in markdown
            assert f"- {row.metric.name}: {row.metric.description}" in markdown
    assert "unedited" not in markdown, "answers to foreign questions are shown when asked for"
    widths = [line.count(" | ") for line in markdown.splitlines() if line.startswith("| exact match")]
    assert len(set(widths)) == 1


def test_the_page_sets_forward_against_backward_for_every_model_under_the_poems(markdown):
    section = markdown[markdown.index("## poems.jsonl") : markdown.index("## open.jsonl")]
    table = section[section.index("Forward against backward") : section.index("Endings")]
    for metric in ("exact match", "nats per token of the given answer"):
        for name in (AR, DM):
            assert f"| {metric} | {name} | 6 |" in table
    assert markdown.count("Forward against backward") == 1


def test_a_bound_is_marked_for_diffusion_alone(markdown):
    lines = [line.split(" | ") for line in markdown.splitlines() if line.startswith("| nats per token |")]
    assert lines and all("<=" not in cells[3] and cells[4].startswith("<= ") for cells in lines)


def test_a_difference_is_bold_if_its_interval_holds_no_zero_and_its_rows_are_enough():
    bold = []
    for low, high, count in ((0.5, 1.5, 20), (0.5, 1.5, 19), (-0.5, 1.5, 20), (-1.5, -0.5, 20)):
        bold.append(page._difference(NATS, Estimate(1.0, None, low, high), count).startswith("**"))
    assert bold == [True, False, False, True]
    assert page._difference(EXACT, Estimate(0.0), 80) == "+0.000"


def test_answers_are_shown_when_asked_for_and_steer_no_page(made, workspace, no_figures):
    changed = json.loads(json.dumps(made[1]))
    questions = next(section for section in changed["sources"] if section["format"] == "questions")
    questions["results"][AR][0]["text"] = "a|b\n\x1b[2J *c*"
    Path("report.json").write_text(json.dumps(changed), encoding="utf-8")
    assert run_command(report, ["--from", "report.json", "--show", "12"]).code == 0
    text = Path("report.md").read_text(encoding="utf-8")
    assert "a\\|b / " in text and "\x1b" not in text and "\\*c\\*" in text


def test_the_page_says_how_answers_were_sampled(made, markdown):
    ar, diffusion = (
        next(line for line in markdown.splitlines() if line.startswith(f"| {kind} answers |"))
        for kind in ("AR", "diffusion")
    )
    for words in ("temperature 0.8, top-k 8", "repetition penalty 0.15 within 128 tokens", "at most 6 new tokens"):
        assert words in ar
    for words in ("policy low_confidence", "4 steps", "one block", "canvas of 6 masked tokens", "temperature 0.8"):
        assert words in diffusion
    settings = made[1]["settings"] | {"ar_temperature": 0.0, "gen_remasking": "factor", "gen_factor": 2.0}
    settings |= {"gen_block_size": 3, "gen_cap_start_ratio": 0.2, "gen_cap_end_ratio": 0.5}
    settings |= {"gen_max_decode_per_step": 2, "gen_steps": 1}
    ar, diffusion = (page.sampling_of({**made[1], "settings": settings}, model) for model in made[1]["models"])
    assert "temperature 0)" in ar
    for words in (
        "factor 2",
        "at most 0.2 of",
        "0.5 after the block's part of 1 step",
        "2 tokens",
        "blocks of 3 tokens",
    ):
        assert words in diffusion


def test_blocks_that_a_model_was_trained_on_are_completed(made):
    """They stand on a grid that begins with the prompt, so few new tokens may lie in two of them."""
    model = made[1]["models"][1] | {"attention": "block", "block_size": 8}
    words = page.sampling_of(made[1], model)
    assert "one block" not in words and "blocks of 8 tokens" in words
    assert "canvas of 6 masked tokens (and those that complete its last block)" in words


CAP = {"gen_cap_start_ratio": 0.3, "gen_cap_end_ratio": 0.3, "gen_max_decode_per_step": 1}
OTHERWISE = {"gen_steps": 5, "gen_confidence_threshold": 0.9, "gen_factor": 0.5} | CAP
NAMED = {  # but for the steps over which a cap grows
    "low_confidence": {"gen_steps"},
    "threshold": {"gen_confidence_threshold", *CAP},
    "factor": {"gen_factor", *CAP},
    "hybrid": {"gen_confidence_threshold", "gen_steps"},
}


@pytest.mark.parametrize("policy", NAMED)
@pytest.mark.parametrize("cap", [(0.2, 0.7, 32), (1.0, 1.0, 32), (1.0, 1.0, 2), (0.5, 0.5, 6)])
def test_the_page_names_the_settings_that_answers_depend_on_and_no_others(policy, cap, made, models):
    """Steps mean nothing to a policy without a schedule, unless its cap grows over them."""
    model = next(model for model in made[1]["models"] if model["name"] == DM)
    base = {"gen_remasking": policy, "gen_steps": 2, "gen_block_size": 6, **dict(zip(CAP, cap, strict=True))}
    base |= {"gen_confidence_threshold": 1e-6, "gen_factor": 1e6}  # whatever is predicted is certain enough

    def described_and_written(**changes):
        config = DenoisingConfig(**base | changes)
        answer = generate(models[DM], Prompt("a"), ContinuationConfig(6, gen_seed=1), config)
        words = page.sampling_of({**made[1], "settings": made[1]["settings"] | base | changes}, model)
        return words, (answer.text, answer.num_forward_passes)

    words, written = described_and_written()
    assert ("step;" in words or "steps;" in words) == ("gen_steps" in NAMED[policy] or cap[0] != cap[1])
    for name, value in OTHERWISE.items():
        other_words, other = described_and_written(**{name: value})
        if name not in NAMED[policy] and name != "gen_steps":
            assert other_words == words, name
        assert other_words != words or other == written, name


def test_figures_have_no_kinds_and_call_the_only_model_of_a_kind_by_it(made, tables):
    axis = figures.draw_quality(made[1], {"questions.jsonl": tables["questions.jsonl"]}).axes[0]
    labels = [label.get_text().rpartition(" (")[0] for label in axis.get_yticklabels()]
    assert {"all", "Chinese", "seen", "seen, Chinese"} <= set(labels) and not any("kind" in one for one in labels)
    assert axis.get_legend_handles_labels()[1] == ["AR", "diffusion"]
    models = [*made[1]["models"], made[1]["models"][0] | {"name": "AR two"}]
    assert list(titles_of(models).values()) == [AR, "diffusion", "AR two"]


def test_bars_and_points_stand_where_the_numbers_say(made, tables):
    panel = figures.draw_quality(made[1], {"questions.jsonl": tables["questions.jsonl"]}).axes[0]
    shown = [row for row in tables["questions.jsonl"] if row.metric.name == "exact match" and "kind" not in row.group]
    expected = [row.values[name].value for name in (AR, DM) for row in shown]
    assert [bar.get_width() for bar in panel.patches] == pytest.approx(expected)
    labels = figures.draw_likelihood(made[1], tables).axes[0].get_legend_handles_labels()[1]
    assert labels == ["AR", "diffusion, upper bound"]
    points = points_of(made[1])
    axes = figures.draw_frontier(made[1], points).axes
    for axis, cost in zip(axes, ("passes", "seconds"), strict=True):
        places = np.sort([x for line in axis.containers for x in line.lines[0].get_xdata()])
        assert places == pytest.approx(np.sort([getattr(point, cost).value for point in points[1]]))


def test_error_bars_are_the_interval_or_95_percent_by_the_standard_error():
    estimates = [Estimate(2.0, None, 1.5, 3.0), Estimate(2.0, 0.5), Estimate(2.0)]
    assert figures.reach(estimates) == [[0.5, pytest.approx(0.98), 0], [1.0, pytest.approx(0.98), 0]]
    assert figures.reach(estimates[2:]) is None


def test_a_picture_of_an_earlier_report_does_not_stay(made, tmp_path, no_figures):
    (tmp_path / "frontier.png").write_bytes(b"old")
    page.draw(made[1], tmp_path, None)
    assert not (tmp_path / "frontier.png").exists()
