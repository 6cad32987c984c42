"""Poems of the report: both directions of a couplet or neither, and forward against backward by couplet."""

import json
from pathlib import Path

import numpy as np
import pytest

from dataset.tokenizer import encode
from scripts.engine.report.couplets import reversals_of
from scripts.engine.statistics import paired_interval
from scripts.eval import report
from tests.scripts.report.test_report import AR, DM, made, place, undrawn  # noqa: F401 (fixtures)

LINES = [("cat", "dog"), ("sun", "moon"), ("red", "blue"), ("one", "two"), ("up", "down"), ("ab", "cd")]
LONG = "the cat sees a small dog in the garden of the house "


def poems(*pairs: tuple[str, str]) -> str:
    rows = [
        {"prompt": prompt, "answer": answer, "question": f"{prompt}?", "direction": direction}
        for pair in pairs
        for direction, (prompt, answer) in (("forward", pair), ("backward", pair[::-1]))
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def asked(place, tokenizer_dir, command, undrawn):  # noqa: F811
    """asked(content of poems.jsonl, flags) -> the result of the command."""

    def ask(content, *more):
        Path("p.jsonl").write_text(content)
        given = ["--minimind-checkpoint", "ar_state_dict.pt", "--eval-data", "p.jsonl", "--dtype", "float32"]
        given += ["--tokenizer-dir", tokenizer_dir, "--frontier-questions", "0", "--max-new-tokens", "6"]
        return command(report, [str(one) for one in (*given, "--out", "new", *more)])

    return ask


def section_of(folder: str = "new") -> dict:
    return json.loads(Path(folder, "report.json").read_text(encoding="utf-8"))["sources"][0]


@pytest.mark.parametrize("limit, kept", [(2, 2), (5, 4), (7, 6), (12, 12)])
def test_a_sample_holds_both_directions_of_a_couplet_or_neither(limit, kept, asked):
    assert asked(poems(*LINES), "--questions", limit).code == 0
    items = section_of()["items"]
    found: dict[str, set[str]] = {}
    for item in items:
        found.setdefault(item["couplet"], set()).add(item["direction"])
    assert len(items) == kept == 2 * len(found)
    assert all(directions == {"forward", "backward"} for directions in found.values())


def test_a_limit_below_a_couplet_is_refused(asked):
    result = asked(poems(*LINES), "--questions", 1)
    assert result.code == 2 and "p.jsonl: no couplet has as few as 1 rows; raise --questions" in result.err


def test_a_couplet_of_which_one_direction_is_too_long_is_left_out_in_both(asked, tokenizer):
    limit = len(encode(tokenizer, LONG)) + 6
    assert asked(poems(*LINES, (LONG, "cat")), "--seq-len", limit).code == 0
    section = section_of()
    assert section["left_out"]["too_long"] == 2
    assert {item["reference"] for item in section["items"]} == {line for pair in LINES for line in pair}


def right_and_wrong(number: int, seed: int) -> tuple[dict, np.ndarray, np.ndarray]:
    """A section of `number` couplets in random order and one row alone; (number, 2) right answers and nats."""
    draw = np.random.default_rng(seed)
    right, nats = draw.integers(0, 2, (number, 2)), draw.uniform(1, 9, (number, 2))
    tokens = draw.integers(2, 9, (number, 2))
    pairs = []
    for i in range(number):
        for way, direction in enumerate(("forward", "backward")):
            item = {"key": f"{i}{way}", "couplet": str(i), "direction": direction, "reference": "a", "wanted": "a"}
            found = {"nats": nats[i, way], "tokens": int(tokens[i, way])}
            pairs.append((item, {"text": "ba"[right[i, way]], "reference_likelihood": found}))
    alone = {"key": "x", "couplet": "x", "direction": "forward", "reference": "a", "wanted": "a"}
    pairs.append((alone, {"text": "a", "reference_likelihood": {"nats": 99.0, "tokens": 1}}))
    pairs = [pairs[i] for i in draw.permutation(len(pairs))]
    section = {
        "format": "poems",
        "items": [item for item, _ in pairs],
        "results": {AR: [result for _, result in pairs]},
    }
    return section, right, np.stack([nats, tokens], axis=2)


def test_forward_minus_backward_is_paired_by_couplet():
    section, right, nats = right_and_wrong(40, 0)
    exact, likelihood = reversals_of(section, [{"name": AR}])
    assert (exact.metric.name, exact.model, exact.count) == ("exact match", AR, 40)
    assert (exact.forward, exact.backward) == pytest.approx(tuple(right.mean(axis=0)))
    assert exact.difference.value == pytest.approx(right[:, 0].mean() - right[:, 1].mean())
    totals = nats.sum(axis=0)
    assert (likelihood.forward, likelihood.backward) == pytest.approx(tuple(totals[:, 0] / totals[:, 1]))
    order = [int(c) for c in dict.fromkeys(item["couplet"] for item in section["items"]) if c != "x"]
    for found, columns in ((exact, np.stack([right, np.ones_like(right)], axis=2)), (likelihood, nats)):
        expected = paired_interval(columns[order, 0].astype(float), columns[order, 1].astype(float))
        assert (found.difference.low, found.difference.high) == pytest.approx(expected)


def test_couplets_equally_hard_in_both_directions_leave_a_narrow_interval():
    """Unpaired, 40 couplets of which half are known would leave one of half of all."""
    section, right, _ = right_and_wrong(40, 1)
    for item, result in zip(section["items"], section["results"][AR], strict=True):
        result["text"] = "a" if item["couplet"] in map(str, range(20)) else "b"
    exact = reversals_of(section, [{"name": AR}])[0]
    assert exact.difference == (0, None, None, None) and exact.forward == 0.5


def test_the_page_sets_forward_against_backward_for_every_model_under_the_poems(made):  # noqa: F811
    page = (made[0] / "report" / "report.md").read_text(encoding="utf-8")
    section = page[page.index("## poems.jsonl") : page.index("## open.jsonl")]
    table = section[section.index("Forward against backward") : section.index("Endings")]
    for metric in ("exact match", "nats per token of the given answer"):
        for name in (AR, DM):
            assert f"| {metric} | {name} | 6 |" in table
    assert page.count("Forward against backward") == 1
