"""Multiple choice by likelihood: the answer of a model is the choice that it finds most likely.

A choice is scored as a reply to its question in the chat template, or as the plain continuation of BOS and the
question. Its own tokens alone are scored, as lm-eval does: EOS would ask how likely the reply is to end there, which
favours choices that look like whole sentences, and is not the question. A diffusion model sees where a choice ends, a
block model within the choice's last block.
"""

import math
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset.jsonl import JSON_TYPES, BadRows, Check, language_of, read_as
from dataset.spelling import spelling_check
from dataset.tokenizer import PreTrainedTokenizerFast
from scripts.engine.likelihood.documents import by_language, kind_of, window_nats
from scripts.engine.likelihood.windows import DataEvalConfig, Window, chosen_rows, seed_of
from scripts.engine.loaded import Loaded
from scripts.engine.prompts import Prompt, condition_and_responses
from scripts.engine.statistics import wilson

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
UNSPACED = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef]")  # Han, kana and their punctuation


class Question(NamedTuple):
    text: str
    choices: list[str]
    answer: int  # place of the right choice
    language: str


class ChoiceNats(NamedTuple):
    """Of each choice of a question, (C,): nats, their variance over the masks drawn, and the tokens scored."""

    nats: np.ndarray
    variance: np.ndarray
    tokens: np.ndarray


@dataclass(frozen=True)
class Accuracy:
    """Share of the questions whose right choice has the least nats (`acc`), or nats per UTF-8 byte of the choice's text
    (`acc_norm`); of equal ones the first is taken. Errors are binomial standard errors, intervals Wilson's of 95 %."""

    kind: str  # of the likelihoods compared: "exact" or "upper bound"
    questions: int
    chance: float  # mean of 1 / choices
    acc: float
    acc_error: float
    acc_interval: tuple[float, float]
    acc_norm: float
    acc_norm_error: float
    acc_norm_interval: tuple[float, float]

    def line(self) -> str:
        shown = [
            f"{name} {value:.4f} +- {error:.4f} [{low:.4f}, {high:.4f}]"
            for name, value, error, (low, high) in (
                ("acc", self.acc, self.acc_error, self.acc_interval),
                ("acc_norm", self.acc_norm, self.acc_norm_error, self.acc_norm_interval),
            )
        ]
        return f"{self.questions:,} questions, chance {self.chance:.4f}: {', '.join(shown)}"


def evaluate_choices(
    loaded: Loaded, config: DataEvalConfig, chat_wrap: bool, bad: BadRows | None = None
) -> tuple[dict[str, Accuracy], int]:
    """Accuracy on all questions of a file and on those of each language, and how many questions were left out because
    one of their choices exceeds the context. ValueError for a bad row, or if nothing is left."""
    questions = read_questions(config.eval_data, bad or BadRows(config.on_bad_row), spelling_check(loaded.tokenizer))
    chosen = chosen_rows(questions, config, content_of)
    enough = (config.eval_max_batches or math.inf) * config.eval_batch_size
    asked, too_long = questions_that_fit(loaded.tokenizer, chosen, loaded.max_length, [chat_wrap], enough)
    if not asked:
        raise ValueError(
            f"{config.eval_data}: all {too_long} questions are longer than --max-seq-len {loaded.max_length}"
        )
    scored = choice_nats(loaded, asked, chat_wrap, config)
    outcomes = [outcome(question, one.nats) for question, one in zip(asked, scored, strict=True)]
    groups = by_language(outcomes, [question.language for question in asked])
    return {name: _accuracy(kind_of(loaded.model), members) for name, members in groups.items()}, too_long


def content_of(question: Question) -> str:
    """What questions are told apart by."""
    return "\n".join([question.text, *question.choices])


def questions_that_fit(
    tokenizer: PreTrainedTokenizerFast,
    questions: Iterable[Question],
    max_length: int,
    wraps: Collection[bool],
    enough: float = math.inf,
) -> tuple[list[Question], int]:
    """The questions whose choices all end within `max_length`, however of `wraps` they are asked, until their choices
    are `enough`; and how many are too long."""
    asked, choices, too_long = [], 0, 0
    for question in questions:
        if choices >= enough:
            break
        rows = [row for wrap in wraps for row in _windows_of(tokenizer, question, 0, wrap)]
        if max(len(row.ids) for row in rows) > max_length:
            too_long += 1
        else:
            asked.append(question)
            choices += len(question.choices)
    return asked, too_long


def choice_nats(loaded: Loaded, questions: list[Question], chat_wrap: bool, config: DataEvalConfig) -> list[ChoiceNats]:
    """Nats of every choice of every question."""
    rows = [_windows_of(loaded.tokenizer, question, number, chat_wrap) for number, question in enumerate(questions)]
    windows = [window for some in rows for window in some]
    tokens = np.array([len(window.ids) - window.begin for window in windows])
    ends = np.cumsum([len(some) for some in rows])[:-1]
    parts = [np.split(a, ends) for a in (*window_nats(loaded, windows, config), tokens)]
    return [ChoiceNats(*of_question) for of_question in zip(*parts, strict=True)]


def read_questions(path: Path, bad: BadRows | None = None, check: Check = str) -> Iterator[Question]:
    """The questions of a JSONL file, as `read_as`; a row is bad of whose texts check(text) raises ValueError, too."""
    return (question for _, question in read_as(path, lambda row: question_of(row, check), bad=bad))


def question_of(row: dict[str, Any], check: Check = str) -> Question:
    """{"question": str, "choices": [str, ...], "answer": index from 0, letter or text} -> Question. ValueError."""
    for name, kind in (("question", str), ("choices", list)):
        if name not in row:
            raise ValueError(f'field "{name}" is missing; fields present: {", ".join(row) or "none"}')
        if not isinstance(row[name], kind):
            raise ValueError(f'field "{name}" is {JSON_TYPES[type(row[name])]}, expected {JSON_TYPES[kind]}')
    text, choices = row["question"], row["choices"]
    if len(choices) < 2:
        raise ValueError(f"expected at least 2 choices, found {len(choices)}")
    for number, choice in enumerate(choices, start=1):
        if not isinstance(choice, str) or not choice.strip():
            found = "empty" if isinstance(choice, str) else JSON_TYPES[type(choice)]
            raise ValueError(f"choice {number} is {found}, expected a text")
    if len(set(choices)) < len(choices):
        raise ValueError("two choices are the same, expected different ones")
    for one in (text, *choices):
        check(one)
    if "answer" not in row:
        raise ValueError(f'field "answer" is missing; fields present: {", ".join(row)}')
    language = row.get("lang")
    if not isinstance(language, str):
        language = language_of("\n".join([text, *choices]))
    return Question(text, choices, _answer_of(row["answer"], choices), language)


def _answer_of(answer: Any, choices: list[str]) -> int:
    last = len(choices) - 1
    if isinstance(answer, int) and not isinstance(answer, bool):
        if not 0 <= answer <= last:
            raise ValueError(f"answer {answer} is out of range, expected 0 to {last}")
        return answer
    if not isinstance(answer, str):
        raise ValueError(f"answer is {JSON_TYPES[type(answer)]}, expected an index from 0, a letter or a choice's text")
    letters = LETTERS[: len(choices)]
    meant = {place for place, choice in enumerate(choices) if choice == answer}
    meant |= {letters.index(answer)} if len(answer) == 1 and answer in letters else set()
    if len(meant) != 1:
        fault = "is one choice's letter and another's text" if meant else "is none of the choices"
        raise ValueError(f'answer "{answer}" {fault}; expected an index from 0 to {last}, a letter or a choice\'s text')
    return meant.pop()


def _windows_of(tokenizer: PreTrainedTokenizerFast, question: Question, number: int, chat_wrap: bool) -> list[Window]:
    """One window per choice; the condition is the same for all. Without the template a question that does not end with
    a blank gets one before the choice, or none beside a Chinese or Japanese character."""
    text, choices = question.text, question.choices
    if text and not chat_wrap and not text[-1].isspace():
        choices = [_glue(text[-1], choice[0]) + choice for choice in choices]
    prompt = Prompt([{"role": "user", "content": text}] if chat_wrap else text)
    condition, responses = condition_and_responses(tokenizer, prompt, choices)
    return [Window(number, condition + ids, seed_of(condition + ids), len(condition)) for ids in responses]


def _glue(before: str, after: str) -> str:
    return "" if UNSPACED.match(before) or UNSPACED.match(after) or after.isspace() else " "


def outcome(question: Question, nats: np.ndarray) -> tuple[int, bool, bool]:
    """(number of choices, right by nats, right by nats per byte)"""
    size = np.array([len(choice.encode("utf-8")) for choice in question.choices])
    return len(size), int(nats.argmin()) == question.answer, int((nats / size).argmin()) == question.answer


def _accuracy(kind: str, outcomes: list[tuple[int, bool, bool]]) -> Accuracy:
    number, right, right_by_byte = np.array(outcomes, dtype=float).T
    acc, acc_norm, count = float(right.mean()), float(right_by_byte.mean()), len(outcomes)
    return Accuracy(
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
