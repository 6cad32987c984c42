"""Quality against cost: every way of decoding on the same questions, none of which disturbs another."""

from dataclasses import replace

import numpy as np
import pytest

from model.decoding.autoregressive import SamplingConfig
from model.decoding.decode import ContinuationConfig
from model.decoding.denoiser import DenoisingConfig
from model.decoding.remasking import POLICIES
from scripts.engine.decoding.generation import generate
from scripts.engine.prompts import Prompt, PromptConfig
from scripts.engine.report import frontier
from scripts.engine.report.frontier import FrontierConfig, measure_frontier
from scripts.engine.report.measure import MeasureConfig, Setup, answers_of
from scripts.engine.report.results import points_of, rows_of, titles_of
from scripts.engine.statistics import is_correct
from scripts.eval import report
from tests.scripts.models import ready, save
from tests.scripts.report.conftest import BOTH, DM, NEW_TOKENS, flags, report_in


def test_the_frontier_has_every_policy_with_every_setting_and_ar(made, sections, models):
    metric, points = points_of(made[1])
    ways = {(point.policy, point.setting) for point in points}
    adaptive = {"hybrid": ["0.9, at most 1 step", "0.9, at most 6 steps"]}
    adaptive |= {"threshold": ["0.5", "0.7", "0.9"], "factor": ["0.5", "1", "2"], "AR": ["temperature 0.8", "greedy"]}
    adaptive["entropy_bound"] = ["0.1", "0.3", "1"]
    assert ways == {(p, s) for p in (*POLICIES, "AR") for s in adaptive.get(p, ["1 step", "6 steps"])}
    assert metric.name == "exact match" and len(points) == len(ways)
    assert made[1]["frontier"]["source"] == "poems.jsonl", "the first file that has right answers"
    items = sections["poems"]["items"][:3]
    for point, recorded in zip(points, made[1]["frontier"]["points"], strict=True):
        results = recorded["results"]
        assert point.passes.value == pytest.approx(np.mean([r["num_forward_passes"] for r in results]))
        right = [is_correct(r["text"], i["wanted"], i["question"]) for r, i in zip(results, items, strict=True)]
        assert point.quality.value == pytest.approx(np.mean(right))
        if point.setting == "1 step":
            assert point.passes.value == 1
    recorded = next(point for point in made[1]["frontier"]["points"] if point["policy"] == "margin")
    config = DenoisingConfig(gen_steps=1, gen_remasking="margin")
    prompt = Prompt([{"role": "user", "content": items[1]["question"]}])
    expected = generate(models[DM], prompt, ContinuationConfig(NEW_TOKENS, gen_seed=12), config)
    assert recorded["results"][1]["text"] == expected.text


def test_the_frontier_is_compared_with_ar_as_it_is_set_and_measured_one_at_a_time(made):
    _, points = points_of(made[1])
    assert (points[0].policy, points[0].difference) == ("AR", None)
    for point, recorded in zip(points, made[1]["frontier"]["points"], strict=True):
        tokens, seconds = (sum(r[name] for r in recorded["results"]) for name in ("num_tokens", "seconds"))
        assert point.tokens_per_second == pytest.approx(tokens / seconds)
        if point.difference is not None:
            assert point.difference.value == pytest.approx(points[0].quality.value - point.quality.value)
    assert made[1]["frontier"]["batch_size"] == 1 and made[1]["settings"]["batch_size"] is None


def test_a_comparison_with_ar_as_it_is_set_survives_a_greedy_that_answers_otherwise(made, sections):
    """Greedy decoding's answers, made right, move its own point alone."""
    changed = {**made[1], "frontier": {**made[1]["frontier"], "points": []}}
    for point in made[1]["frontier"]["points"]:
        if (point["policy"], point["setting"]) == ("AR", "greedy"):
            pairs = zip(point["results"], sections["poems"]["items"][:3], strict=True)
            point = point | {"results": [result | {"text": item["wanted"]} for result, item in pairs]}
        changed["frontier"]["points"].append(point)
    first = points_of(changed)[1][0]
    for before, after in zip(points_of(made[1])[1], points_of(changed)[1], strict=True):
        if after.setting == "greedy":
            assert (after.quality.value, after.difference.value) == (1, first.quality.value - 1)
        else:
            assert before.difference == after.difference


@pytest.fixture
def setup(models, tokenizer):
    """The models of the report, their questions seeded to the last seed there is."""
    sampling = SamplingConfig(), DenoisingConfig(gen_steps=2)
    continuation = ContinuationConfig(6, gen_seed=2**32 - 1)
    return Setup(models, tokenizer, MeasureConfig(64), PromptConfig(), continuation, *sampling)


def test_a_question_is_answered_by_all_samplers_before_the_next_is_and_as_if_it_were_alone(
    setup, sections, monkeypatch
):
    order, answer_batch = [], frontier.answer_batch

    def noted(loaded, prompts, continuation, sampler):
        order.append((continuation.gen_seed, len(prompts)))
        return answer_batch(loaded, prompts, continuation, sampler)

    monkeypatch.setattr(frontier, "answer_batch", noted)
    measured = measure_frontier(setup, FrontierConfig(4, POLICIES, (2,), (0.9,), (1.0,), (0.1,)), sections["questions"])
    assert [point["policy"] for point in measured["points"]] == ["AR", "AR", *POLICIES]
    first = (2**32 - 1) % (2**32 - 4)
    assert order == [(first + place, 1) for place in range(4) for _ in measured["points"]]
    for point in measured["points"]:
        if point["policy"] in ("AR", "random") and point["setting"] != "greedy":
            config = replace(setup.denoising, gen_remasking="random") if point["policy"] == "random" else setup.sampling
            alone = answers_of(setup, point["model"], sections["questions"]["items"][:4], config, 1)
            assert [answer["text"] for answer in point["results"]] == [answer["text"] for answer in alone]
            assert len({answer["text"] for answer in alone}) > 1


JOINT = (
    *("--minimind-checkpoint", "ar_state_dict.pt,j_state_dict.pt"),
    *("--diffusion-checkpoint", "dm_state_dict.pt,j_state_dict.pt"),
)


def test_joint_weights_stand_in_one_frontier_with_all_their_ways_of_writing(
    place, tokenizer, tokenizer_dir, command, no_figures
):
    """Self-speculation is theirs alone, and writes the text of the same weights as AR; each way has its own name."""
    save("j_state_dict.pt", ready(tokenizer, "joint 3"), "sft")
    greedy = "--ar-temperature", "0", "--gen-temp", "0", "--ar-repeat-penalty", "0", "--gen-repeat-penalty", "0"
    argv = [*JOINT, *flags(tokenizer_dir, *greedy, without=("--nmc", "--canvas", "--gen-steps"))]
    argv += ["--eval-data", "questions.jsonl", "--questions", "4", "--frontier-questions", "2", "--out", "new"]
    argv += ["--frontier-policies", "threshold,self_speculative", "--frontier-thresholds", "0.5"]
    result = command(report, argv)
    assert result.code == 0, result.err
    points = report_in("new")["frontier"]["points"]
    texts = {(p["model"], p["policy"]): [r["text"] for r in p["results"]] for p in points}
    ways = [("AR ar", "AR"), ("AR j", "AR"), ("diffusion dm", "threshold"), ("diffusion j", "threshold")]
    assert list(texts) == [*ways, ("diffusion j", "self_speculative")]
    assert texts["diffusion j", "self_speculative"] == texts["AR j", "AR"]
    assert list(titles_of(report_in("new")["models"]).values()) == [
        "AR",
        "joint, as AR",
        "full attention",
        "joint, in blocks",
    ]
    rows = rows_of(report_in("new")["sources"][0], report_in("new")["models"])
    assert list(rows[0].differences) == ["AR j", "diffusion dm", "diffusion j"]


@pytest.mark.parametrize(
    "policies, more, words",
    [
        (
            "threshold",
            ("--frontier-factors", "1"),
            "--frontier-factors has no effect without --frontier-policies factor",
        ),
        ("factor", ("--frontier-steps", "1"), "--frontier-steps has no effect without --frontier-policies"),
        ("factor", ("--gen-steps", "1"), "--gen-steps has no effect"),
        ("threshold,self_speculative", (), "--frontier-policies self_speculative is for joint weights"),
    ],
)
def test_settings_of_policies_that_are_not_tried_are_refused(policies, more, words, place, tokenizer_dir, refused):
    argv = [
        *BOTH,
        *flags(tokenizer_dir, without=("--nmc", "--canvas", "--gen-steps")),
        "--eval-data",
        "questions.jsonl",
    ]
    refused(report, [*argv, "--gen-remasking", "threshold", "--frontier-policies", policies, *more], words)
