"""Multiple choice by likelihood: the answer of a model is the choice that it finds most likely.

A choice is scored as a reply to its question in the chat template, or as the plain continuation of BOS and the
question. Only its own tokens are scored, as in lm-eval: EOS would ask how likely the reply is to end there, which
favours choices that look like whole sentences. A diffusion model sees where a choice ends, a block model within the
choice's last block.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dataset.reading.bad_rows import BadRows
from dataset.rows.choice_formats import Question, read_questions
from dataset.spelling import spelling_check
from dataset.tokenizer import PreTrainedTokenizerFast
from scripts.engine.likelihood.documents import by_language, kind_of, window_nats
from scripts.engine.likelihood.windows import DataEvalConfig, Window, chosen_rows, seed_of
from scripts.engine.loaded import Loaded
from scripts.engine.prompts import Ask, condition_and_responses
from scripts.engine.statistics import wilson

UNSPACED = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]")  # Han, kana and their punctuation


class ChoiceNats(NamedTuple):
    """Scores of the C choices of a question, (C,) each."""

    nats: np.ndarray
    variance: np.ndarray  # of the nats, over the masks drawn
    tokens: np.ndarray


@dataclass(frozen=True)
class Accuracy:
    """Share of the questions whose right choice has the least nats (`acc`), or the least nats per UTF-8 byte of its
    text (`acc_norm`); of equal ones the first is taken. Errors are binomial standard errors, intervals Wilson's of
    95 %."""

    kind: str  # of the likelihoods compared: "exact" or "upper bound"
    questions: int
    chance: float  # mean of 1 / choices
    acc: float
    acc_error: float
    acc_interval: tuple[float, float]
    acc_norm: float
    acc_norm_error: float
    acc_norm_interval: tuple[float, float]

    @classmethod
    def of(cls, kind: str, outcomes: list[tuple[int, bool, bool]]) -> "Accuracy":
        """Summarise the `outcome`s of questions."""
        number, right, right_by_byte = np.array(outcomes, dtype=float).T
        acc, acc_norm, count = float(right.mean()), float(right_by_byte.mean()), len(outcomes)
        return cls(
            kind=kind,
            questions=count,
            chance=float((1 / number).mean()),
            acc=acc,
            acc_error=math.sqrt(acc * (1 - acc) / count),
            acc_interval=wilson(acc, count),
            acc_norm=acc_norm,
            acc_norm_error=math.sqrt(acc_norm * (1 - acc_norm) / count),
            acc_norm_interval=wilson(acc_norm, count),
        )

    def line(self) -> str:
        acc = _with_interval("acc", self.acc, self.acc_error, self.acc_interval)
        acc_norm = _with_interval("acc_norm", self.acc_norm, self.acc_norm_error, self.acc_norm_interval)
        return f"{self.questions:,} questions, chance {self.chance:.4f}: {acc}, {acc_norm}"


def _with_interval(name: str, value: float, error: float, interval: tuple[float, float]) -> str:
    low, high = interval
    return f"{name} {value:.4f} +- {error:.4f} [{low:.4f}, {high:.4f}]"


def evaluate_choices(
    loaded: Loaded, config: DataEvalConfig, ask: Ask, bad: BadRows | None = None
) -> tuple[dict[str, Accuracy], int]:
    """Accuracy on all questions of a file and on those of each language, and how many questions were left out because
    one of their choices exceeds the context. ValueError for a bad row, or if nothing is left."""
    bad, check = bad or BadRows(config.on_bad_row), spelling_check(loaded.tokenizer)
    rows = (question for _, question in read_questions(config.eval_data, bad=bad, check=check))
    chosen = chosen_rows(rows, config, lambda question: question.content)
    fitting = questions_that_fit(loaded.tokenizer, chosen, loaded.max_length, [ask], config.max_windows)
    questions, too_long = fitting
    if not questions:
        raise ValueError(
            f"{config.eval_data}: all {too_long} questions are longer than --max-seq-len {loaded.max_length}"
        )
    scores = choice_nats(loaded, questions, ask, config)
    outcomes = [outcome(question, score.nats) for question, score in zip(questions, scores, strict=True)]
    groups = by_language(outcomes, [question.language for question in questions])
    return {name: Accuracy.of(kind_of(loaded.model), members) for name, members in groups.items()}, too_long


def questions_that_fit(
    tokenizer: PreTrainedTokenizerFast,
    questions: Iterable[Question],
    max_length: int,
    asks: Iterable[Ask],
    max_choices: float = math.inf,
) -> tuple[list[Question], int]:
    """The questions whose choices all end within `max_length`, in whichever of these ways they are asked, until they
    have `max_choices`; and how many of those met are too long."""
    fitting, choices, too_long = [], 0, 0
    for question in questions:
        if choices >= max_choices:
            break
        rows = [row for ask in asks for row in _windows_of(tokenizer, question, 0, ask)]
        if max(len(row.ids) for row in rows) > max_length:
            too_long += 1
        else:
            fitting.append(question)
            choices += len(question.choices)
    return fitting, too_long


def choice_nats(loaded: Loaded, questions: list[Question], ask: Ask, config: DataEvalConfig) -> list[ChoiceNats]:
    """Nats of every choice of every question."""
    windows, ends = [], []
    for number, question in enumerate(questions):
        windows += _windows_of(loaded.tokenizer, question, number, ask)
        ends.append(len(windows))
    nats, variance = window_nats(loaded, windows, config)
    tokens = np.array([len(window.ids) - window.begin for window in windows])
    per_question = zip(*(np.split(values, ends[:-1]) for values in (nats, variance, tokens)), strict=True)
    return [ChoiceNats(*scores) for scores in per_question]


def outcome(question: Question, nats: np.ndarray) -> tuple[int, bool, bool]:
    """(number of choices, right by nats, right by nats per byte)"""
    size = np.array([len(choice.encode("utf-8")) for choice in question.choices])
    return len(size), int(nats.argmin()) == question.answer, int((nats / size).argmin()) == question.answer


def _windows_of(tokenizer: PreTrainedTokenizerFast, question: Question, number: int, ask: Ask) -> list[Window]:
    """One window per choice; the condition is the same for all. Outside the template a question that does not end with
    white space gets a space before the choice, or none beside a Chinese or Japanese character."""
    prompt, text, choices = ask(question.text), question.text, question.choices
    if text and isinstance(prompt.content, str) and not text[-1].isspace():
        choices = [_glue(text[-1], choice[0]) + choice for choice in choices]
    condition, responses = condition_and_responses(tokenizer, prompt, choices)
    return [Window(number, condition + ids, seed_of(condition + ids), len(condition)) for ids in responses]


def _glue(before: str, after: str) -> str:
    return "" if UNSPACED.match(before) or UNSPACED.match(after) or after.isspace() else " "
