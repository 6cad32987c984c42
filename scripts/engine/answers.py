"""Answers to the prompts of a file, and what can be said of them without a judge: variety, loops, endings, cost."""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from tqdm import tqdm

from dataset.jsonl import content_hash, language_of, read_rows
from dataset.sft import Messages, messages_of
from dataset.tokenizer import PreTrainedTokenizerFast, encode, encode_chat, render_chat
from model.decode import ContinuationConfig, DenoisingConfig, SamplingConfig
from scripts.engine.evaluation import Loaded
from scripts.engine.generation import generate_batch
from scripts.engine.runtime import RuntimeConfig

COLUMNS = (  # of the table
    "tokens",
    "distinct_1",
    "distinct_2",
    "longest_repeat",
    "premature",
    "overrun",
    "forward_passes",
    "tokens_per_pass",
    "tokens_per_second",
)
PREMATURE = 0.25  # of the reference's length; an answer that ends below it ended too early


@dataclass(frozen=True)
class Question:
    """A conversation up to its last reply, and that reply."""

    messages: Messages
    reference: str
    language: str


@dataclass(frozen=True)
class Answer:
    """What a decoder wrote, or the reference itself."""

    text: str
    num_tokens: int  # up to EOS, that included
    ended: bool
    num_forward_passes: int = 0
    seconds: float = 0.0


def questions_of(
    path: Path, tokenizer: PreTrainedTokenizerFast, per_language: int, max_new_tokens: int, max_length: int
) -> list[Question]:
    """Up to `per_language` questions in each language, chosen by content hash among those that fit.

    A question fits if the prompt and `max_new_tokens` are within `max_length` and its reference, EOS included, within
    `max_new_tokens`: no answer is cut that the reference shows to be short enough.
    """
    fitting: dict[str, list[tuple[int, Question]]] = {}
    for number, row in read_rows(path):
        try:
            messages = messages_of(row)
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from None
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        prompt, reference = messages[:last], messages[last]["content"]
        size = len(encode_chat(tokenizer, prompt, add_generation_prompt=True)) if prompt else max_length
        if size + max_new_tokens <= max_length and len(encode(tokenizer, reference)) < max_new_tokens:
            order = content_hash(render_chat(messages, add_generation_prompt=False))
            language = language_of(reference)
            fitting.setdefault(language, []).append((order, Question(prompt, reference, language)))
    chosen = [
        question
        for language in sorted(fitting, reverse=True)
        for _, question in sorted(fitting[language], key=lambda pair: pair[0])[:per_language]
    ]
    if not chosen:
        raise ValueError(
            f"{path}: no row has a prompt that leaves room for --max-new-tokens {max_new_tokens} within --max-seq-len "
            f"{max_length} and a reply that fits"
        )
    return chosen


def references(tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]) -> list[Answer]:
    sizes = [len(encode(tokenizer, question.reference)) + 1 for question in questions]
    return [Answer(q.reference, size, True) for q, size in zip(questions, sizes, strict=True)]


def answer_all(
    loaded: Loaded,
    questions: list[Question],
    name: str,
    batch_size: int,
    continuation: ContinuationConfig,
    config: SamplingConfig | DenoisingConfig,
    runtime: RuntimeConfig,
    max_length: int,
) -> list[Answer]:
    """The answers of one sampler, in batches; the first batch is made twice, since the first time is slower."""
    answers: list[Answer] = []
    batches = [questions[first : first + batch_size] for first in range(0, len(questions), batch_size)]
    for number, batch in enumerate(tqdm([batches[0], *batches], desc=name, disable=not sys.stderr.isatty())):
        made = generate_batch(
            loaded.model,
            loaded.tokenizer,
            [question.messages for question in batch],
            continuation,
            config,
            runtime,
            max_length,
        )
        if number:
            answers += [
                Answer(g.text, g.num_tokens, g.ended, g.num_forward_passes, g.seconds / len(batch)) for g in made
            ]
    return answers


def describe(
    tokenizer: PreTrainedTokenizerFast, answers: Sequence[Answer], reference: Sequence[Answer]
) -> dict[str, Any]:
    """Figures of a set of answers to questions with these references; means with their standard errors over answers.

    distinct_n: distinct token n-grams / all n-grams, over all answers together. longest_repeat: length of the longest
    token sequence that an answer contains twice, as a share of the answer. premature: ended below a quarter of the
    reference's length. overrun: did not end. Tokens count up to EOS, that included.
    """
    ids = [encode(tokenizer, answer.text) for answer in answers]
    seconds = sum(answer.seconds for answer in answers)
    tokens = sum(answer.num_tokens for answer in answers)
    passes = sum(answer.num_forward_passes for answer in answers)
    return {
        "answers": len(answers),
        "tokens": mean_and_error([answer.num_tokens for answer in answers]),
        **{f"distinct_{n}": distinct(ids, n) for n in (1, 2, 3)},
        "longest_repeat": mean_and_error([longest_repeat(one) / max(len(one), 1) for one in ids]),
        "premature": mean_and_error(
            [
                float(a.ended and a.num_tokens < PREMATURE * r.num_tokens)
                for a, r in zip(answers, reference, strict=True)
            ]
        ),
        "overrun": mean_and_error([float(not answer.ended) for answer in answers]),
        "forward_passes": mean_and_error([answer.num_forward_passes for answer in answers]),
        "tokens_per_pass": tokens / passes if passes else None,
        "tokens_per_second": tokens / seconds if seconds else None,
    }


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and its standard error where there are two values or more."""
    return fmean(values), stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def distinct(texts: Sequence[Sequence[int]], n: int) -> float | None:
    """Distinct n-grams / all n-grams; None where no text has n tokens."""
    counts = Counter(tuple(ids[i : i + n]) for ids in texts for i in range(len(ids) - n + 1))
    return len(counts) / counts.total() if counts else None


def longest_repeat(ids: Sequence[int]) -> int:
    """Length of the longest sequence that occurs twice; the two may overlap."""
    best, above = 0, [0] * (len(ids) + 1)
    for i in range(len(ids)):
        row = [0] * (len(ids) + 1)  # row[j + 1]: length of the match that ends at i and at j
        for j in range(i):
            if ids[i] == ids[j]:
                row[j + 1] = above[j] + 1
                best = max(best, row[j + 1])
        above = row
    return best


def table(figures: dict[str, Any], languages: list[str]) -> list[str]:
    """One line per sampler and language."""
    width = max(map(len, figures)) + 2
    lines = [f"{'':<{width}}{'':<7}" + "".join(f"{name:>17}" for name in COLUMNS)]
    for name, groups in figures.items():
        for language in languages:
            cells = "".join(f"{cell(groups[language][column]):>17}" for column in COLUMNS)
            lines.append(f"{name:<{width}}{language:<7}{cells}")
    return [*lines, "mean +- standard error over the answers; distinct n-grams are those of all answers together"]


def cell(value: Any) -> str:
    if value is None or value == (0.0, 0.0):
        return "-" if value is None else "0"
    if isinstance(value, tuple):
        mean, error = value
        return f"{mean:.2f}" + ("" if error is None else f" +- {error:.2f}")
    return f"{value:.3f}" if value < 10 else f"{value:.0f}"


def samples(answers: dict[str, list[Answer]], questions: list[Question], languages: list[str], count: int) -> list[str]:
    """The first `count` questions of each language with every sampler's answer."""
    lines = []
    for language in languages:
        chosen = [i for i, question in enumerate(questions) if question.language == language][:count]
        for i in chosen:
            lines += ["", f"user: {questions[i].messages[-1]['content']}"]
            lines += [
                f"{name}: {made[i].text}" + ("" if made[i].ended else " [no EOS]") for name, made in answers.items()
            ]
    return lines
