"""Exercises of a report: rows that are answered in words, and couplets of which both lines are asked."""

from typing import Any

from dataset.rows.exercise_formats import Exercise
from dataset.tokenizer import PreTrainedTokenizerFast, encode


def item_of(exercise: Exercise, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The exercise in report.json."""
    return {
        "key": exercise.key,
        "lang": exercise.language,
        **exercise.labels,
        **({"couplet": exercise.couplet} if exercise.couplet else {}),
        "question": exercise.text,
        "reference": exercise.reference,
        **({} if exercise.wanted is None else {"wanted": exercise.wanted}),
        **({"whole": True} if exercise.whole else {}),
        "reference_tokens": len(encode(tokenizer, exercise.reference)) + 1,
    }


def whole_couplets(exercises: list[Exercise], kept: list[Exercise]) -> list[Exercise]:
    """`kept` without couplets of which only a part was kept: both directions or neither."""
    rows = {exercise.row for exercise in kept}
    cut = {exercise.couplet for exercise in exercises if exercise.couplet and exercise.row not in rows}
    return [exercise for exercise in kept if exercise.couplet not in cut]
