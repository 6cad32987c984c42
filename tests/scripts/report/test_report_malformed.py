"""A report.json that was cut, edited or written by something else: one sentence, or the same page."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scripts.engine.report import couplets as report_couplets
from scripts.engine.report import page as report_page
from scripts.engine.report import results as report_results
from scripts.engine.report.measure import ANSWERED
from scripts.engine.report.page import draw, read_report
from scripts.eval import report
from tests.scripts.report.test_report import AR, DM, made  # noqa: F401 (a fixture)

OTHERS = (None, "x", [None])


@pytest.fixture
def small(made, monkeypatch) -> dict[str, Any]:  # noqa: F811
    """The report with one row of each file, drawn without pictures and with few resamples."""
    for name in ("draw_quality", "draw_likelihood", "draw_frontier"):
        monkeypatch.setattr(report_page, name, lambda *a: None)
    for module in (report_results, report_couplets):
        resampled = module.resampled_sums
        monkeypatch.setattr(module, "resampled_sums", lambda values, resampled=resampled: resampled(values, 5))
    cut = copy.deepcopy(made[1])
    for section in cut["sources"]:
        section["items"] = section["items"][:1]
        section["results"] = {name: results[:1] for name, results in section["results"].items()}
        if section["format"] in ANSWERED:
            for result in (results[0] for results in section["results"].values()):
                result["ids"] = result["ids"][:1]
    cut["frontier"] |= {"items": 1, "points": [cut["frontier"]["points"][0], cut["frontier"]["points"][5]]}
    for point in cut["frontier"]["points"]:
        point["results"] = [point["results"][0] | {"ids": [1]}]
    return cut


def places(value: Any) -> Iterator[tuple]:
    """Every path to a value within a JSON value."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (key,)
        yield from ((key, *more) for more in places(value[key]) if key != "config")  # which nothing is drawn from


def without_or_another(whole: Any) -> Iterator[tuple[str, Any]]:
    """What was done, and the value with one part taken out or of another kind."""
    for path in places(whole):
        inner = whole
        for key in path[:-1]:
            inner = inner[key]
        kept = copy.copy(inner)
        del inner[path[-1]]
        yield f"{path} taken out", whole
        inner.clear() if isinstance(inner, dict) else inner.__delitem__(slice(None))
        inner.update(kept) if isinstance(inner, dict) else inner.extend(kept)
        for other in OTHERS:
            inner[path[-1]] = other
            yield f"{path} = {other!r}", whole
        inner[path[-1]] = kept[path[-1]]


def test_whatever_is_missing_or_of_another_kind_the_report_is_refused_or_drawn(small, tmp_path):
    path, refused, drawn, failed = tmp_path / "r.json", 0, 0, []
    path.write_text(json.dumps(small))
    draw(read_report(path), tmp_path, 1)
    for done, changed in without_or_another(small):
        path.write_text(json.dumps(changed))
        try:
            found = read_report(path)
        except ValueError as error:
            assert str(path) in str(error) and "; give a report.json that this command wrote" in str(error), done
            refused += 1
            continue
        try:
            draw(found, tmp_path, 1)
        except Exception as error:
            failed.append(f"{done}: accepted, and then {error!r}")
        drawn += 1
    assert not failed, failed
    assert refused > 400 and drawn > 50


def test_one_sentence_names_the_file_and_what_is_wrong_with_it(small, workspace, command):
    whole, path = json.dumps(small), Path("r.json")

    def told(content: str | bytes) -> str:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        result = command(report, ["--from", "r.json"])
        assert result.code == 2 and result.err.count("\n") == 1 and "; give a report.json" in result.err
        return result.err

    assert "r.json is no JSON, or was cut" in told(whole[: len(whole) // 2])
    assert "r.json is no JSON, or was cut" in told(b"\xff\xfe")
    assert "r.json is no JSON, or was cut" in told(200_000 * "[")
    assert "r.json is no JSON, or was cut" in told(whole.replace('"seed": 11', '"seed": NaN'))
    assert "r.json is no report of this version" in told(json.dumps(small | {"report_format": report_page.FORMAT - 1}))
    assert "it has no 'models'" in told(json.dumps({k: v for k, v in small.items() if k != "models"}))
    small["sources"][0]["results"][DM].pop()
    assert "text.jsonl: results of diffusion dm: 0 rows, expected 1" in told(json.dumps(small))
    del small["sources"][0]["results"][AR]
    assert "text.jsonl: results has no 'AR ar'" in told(json.dumps(small))
