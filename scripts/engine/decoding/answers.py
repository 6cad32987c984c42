"""Answers to the prompts of a file, and what can be said of them without reading: variety, loops, endings, cost."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset.content import content_hash, language_of
from dataset.reading.bad_rows import BadRows
from dataset.rows.formats import read_conversations
from dataset.rows.messages import Messages, is_learnt
from dataset.spelling import spelling_check
from dataset.tokenizer import PreTrainedTokenizerFast, encode, encode_chat, render_chat
from model.decoding.decode import ContinuationConfig
from scripts.engine.decoding.generation import Sampler, first_seed, generate_batch, warm_up
from scripts.engine.decoding.trace_terminal import on_screen
from scripts.engine.likelihood.documents import window_nats
from scripts.engine.likelihood.windows import DataEvalConfig, Window
from scripts.engine.loaded import Loaded
from scripts.engine.prompts import NO_SYSTEM, Prompt, SystemConfig, system_of
from scripts.engine.statistics import distinct, longest_repeat, mean_and_error, ratio_error

PREMATURE = 0.25  # of the reference's length; an answer that ends below it ended too early
COLUMNS = (  # of the table
    "tokens",
    "distinct_1",
    "distinct_2",
    "longest_repeat",
    "premature",
    "overrun",
    "judged",
    "forward_passes",
    "tokens_per_pass",
    "tokens_per_second",
    "edits",
)
LEGEND = (
    "mean +- standard error over the answers; distinct_n: of all answers together; longest_repeat: share of an answer; "
    "premature: ended below a quarter of the reference; overrun: no end; judged: nats per token under --judge; tokens "
    "count up to EOS"
)


@dataclass(frozen=True)
class Question:
    """A conversation up to its last reply, and that reply."""

    messages: Messages
    reference: str
    language: str


@dataclass(frozen=True)
class Answer:
    """A text written by a decoder, or the reference itself."""

    text: str
    num_tokens: int  # up to and including EOS
    ended: bool
    num_forward_passes: int = 0
    seconds: float = 0.0
    judged_nats: float | None = None  # of it and its EOS under a judge, an autoregressive model; see `judge`
    judged_tokens: int = 0
    num_edits: int | None = None  # written tokens that gave way to others; none: the decoder does not edit


def questions_of(
    path: Path,
    tokenizer: PreTrainedTokenizerFast,
    per_language: int,
    room: tuple[int, int],
    bad: BadRows | None = None,
    systems: SystemConfig = NO_SYSTEM,
) -> tuple[list[Question], dict[str, int]]:
    """Up to `per_language` questions in each language, chosen by content hash among those that fit; and the number of
    rows ("rows") and, per language, of different ones that fit. ValueError for a bad row, or if none fits.

    room: max_new_tokens and max_length. systems: the system prompt of conversations that have none.
    A question fits if the prompt and `max_new_tokens` are within `max_length` and its reference, EOS included, within
    `max_new_tokens`: no answer is cut that could be as short as the reference. An empty reply, or one to nothing, is
    not a reference.
    """
    max_new_tokens, max_length = room
    fitting: dict[str, dict[int, Question]] = {}
    rows = 0
    for _, messages in read_conversations(path, None, bad, spelling_check(tokenizer)):
        rows += 1
        last = max(i for i, message in enumerate(messages) if is_learnt(message))
        prompt, reference = systems.opened(messages[:last]), messages[last]["content"]
        if not last or not reference.strip():
            continue
        size, reply = len(encode_chat(tokenizer, prompt, True)), len(encode(tokenizer, reference))
        if size + max_new_tokens <= max_length and reply < max_new_tokens:
            order, language = content_hash(render_chat(messages, False)), language_of(reference)
            fitting.setdefault(language, {})[order] = Question(prompt, reference, language)
    if not fitting:
        raise ValueError(
            f"{path}: no row has a prompt that leaves room for --max-new-tokens {max_new_tokens} within --max-seq-len "
            f"{max_length} and a reply that fits"
        )
    languages = sorted(fitting, reverse=True)
    chosen = [fitting[language][order] for language in languages for order in sorted(fitting[language])[:per_language]]
    return chosen, {"rows": rows, **{language: len(fitting[language]) for language in languages}}


def note_on_systems(questions: Sequence[Question], system: str) -> str | None:
    """A sentence if some questions have another system prompt than `system`. ValueError if all have."""
    others = sum(system_of(question.messages) != system for question in questions) if system else 0
    if others and others == len(questions):
        raise ValueError("--system has no effect: every question has a system prompt of its own; leave it out")
    return f"{others} of {len(questions)} questions keep their own system prompt (--system)" if others else None


def references(tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]) -> list[Answer]:
    sizes = [len(encode(tokenizer, question.reference)) + 1 for question in questions]
    return [Answer(q.reference, size, True) for q, size in zip(questions, sizes, strict=True)]


def answer_all(
    loaded: Loaded,
    prompts: Sequence[Prompt],
    continuation: ContinuationConfig,
    sampler: Sampler,
    batch_size: int,
    name: str,
) -> list[Answer]:
    """The answers of one sampler, in batches; prompt i is sampled with the seed plus i, whatever its batch. `name`
    labels the progress bar."""
    warm_up(loaded, prompts[:batch_size], continuation, sampler)
    answers: list[Answer] = []
    for first in tqdm(range(0, len(prompts), batch_size), desc=name, disable=not sys.stderr.isatty()):
        seeded = seeded_at(loaded, continuation, first, len(prompts))
        answers += answer_batch(loaded, prompts[first : first + batch_size], seeded, sampler)
    return answers


def seeded_at(loaded: Loaded, continuation: ContinuationConfig, place: int, count: int) -> ContinuationConfig:
    """The continuation with the seed of prompt `place` of `count`; the seeds of all of them are below 2**32."""
    return replace(continuation, gen_seed=first_seed(loaded, continuation) % (2**32 - count) + place)


def answer_batch(
    loaded: Loaded, prompts: Sequence[Prompt], continuation: ContinuationConfig, sampler: Sampler
) -> list[Answer]:
    """The answers to prompts that share forward passes, each with its share of the seconds."""
    return [
        Answer(g.text, g.num_tokens, g.ended, g.num_forward_passes, g.seconds / len(prompts), num_edits=g.num_edits)
        for g in generate_batch(loaded, prompts, continuation, sampler)
    ]


def judge(loaded: Loaded, questions: list[Question], answers: list[Answer]) -> list[Answer]:
    """The answers with their nats under an autoregressive model, given their prompts: what it finds odd costs much.
    Text that repeats itself costs little; look at longest_repeat, too."""
    windows = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        prompt = encode_chat(loaded.tokenizer, question.messages, True)
        reply = encode(loaded.tokenizer, answer.text) + [loaded.tokenizer.eos_token_id] * answer.ended
        windows.append(Window(number, (prompt + reply)[: loaded.max_length], 0, len(prompt)))
    written = [window for window in windows if len(window.ids) > window.begin]  # the others have not even an EOS
    nats, _ = window_nats(loaded, written, DataEvalConfig())
    costs = {window.document: cost for window, cost in zip(written, nats.tolist(), strict=True)}
    return [
        replace(answer, judged_nats=costs.get(number, 0.0), judged_tokens=len(window.ids) - window.begin)
        for number, (answer, window) in enumerate(zip(answers, windows, strict=True))
    ]


# -- figures -----------------------------------------------------------------------------------------------------------


def figures_of(
    tokenizer: PreTrainedTokenizerFast, answers: dict[str, list[Answer]], questions: Sequence[Question]
) -> dict[str, dict[str, dict[str, Any]]]:
    """sampler -> language -> `describe` of its answers; "reference" is one of the samplers."""
    figures: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in answers}
    for language in dict.fromkeys(question.language for question in questions):
        places = [i for i, question in enumerate(questions) if question.language == language]
        reference = [answers["reference"][i] for i in places]
        for name, written in answers.items():
            figures[name][language] = describe(tokenizer, [written[i] for i in places], reference)
    return figures


def describe(
    tokenizer: PreTrainedTokenizerFast, answers: Sequence[Answer], reference: Sequence[Answer]
) -> dict[str, Any]:
    """Figures of a set of answers to questions with these references; a pair is a mean over the answers and its
    standard error.

    distinct_n: distinct token n-grams / all n-grams, over all answers together; it falls with their number.
    longest_repeat: length of the longest token sequence that an answer contains twice, as a share of the answer.
    premature: ended below a quarter of the reference's length. overrun: did not end. Tokens count up to and including
    EOS. judged: nats per token under a judge and their standard error. References were not computed: no cost (None).
    edits: of decoders that edit.
    """
    ids = [encode(tokenizer, answer.text) for answer in answers]
    repeats = [longest_repeat(row) / max(len(row), 1) for row in ids]
    premature = [float(is_premature(a, r)) for a, r in zip(answers, reference, strict=True)]
    tokens = [answer.num_tokens for answer in answers]
    passes = [answer.num_forward_passes for answer in answers]
    edits = [answer.num_edits for answer in answers if answer.num_edits is not None]
    seconds = sum(answer.seconds for answer in answers)
    return {
        "answers": len(answers),
        "tokens": mean_and_error(tokens),
        **{f"distinct_{n}": distinct(ids, n) for n in (1, 2, 3)},
        "longest_repeat": mean_and_error(repeats),
        "premature": mean_and_error(premature),
        "overrun": mean_and_error([float(not answer.ended) for answer in answers]),
        "judged": _judged(answers),
        "forward_passes": mean_and_error(passes) if any(passes) else None,
        "tokens_per_pass": sum(tokens) / sum(passes) if any(passes) else None,
        "tokens_per_second": sum(tokens) / seconds if seconds else None,
        "edits": mean_and_error(edits) if edits else None,
    }


def _judged(answers: Sequence[Answer]) -> tuple[float, float] | None:
    if any(answer.judged_nats is None for answer in answers):
        return None
    nats = np.array([answer.judged_nats for answer in answers])
    tokens = np.array([answer.judged_tokens for answer in answers], dtype=float)
    return float(nats.sum() / tokens.sum()), ratio_error(nats, tokens)


def is_premature(answer: Answer, reference: Answer) -> bool:
    return answer.ended and answer.num_tokens < PREMATURE * reference.num_tokens


def table(figures: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """One line per sampler and language, under a line of column names."""
    rows = [["", "", *COLUMNS]]
    for name, groups in figures.items():
        rows += [[name, language, *(cell(group[column]) for column in COLUMNS)] for language, group in groups.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        names = [f"{text:<{width}}" for text, width in zip(row[:2], widths[:2], strict=True)]
        numbers = [f"{text:>{width}}" for text, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(names + numbers))
    return [*lines, LEGEND]


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        mean, error = value
        return f"{mean:.2f}" + ("" if error is None else f" +- {error:.2f}")
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def samples(answers: dict[str, list[Answer]], questions: list[Question], count: int) -> list[str]:
    """The first `count` questions of each language with the answers of every sampler."""
    lines = []
    for language in dict.fromkeys(question.language for question in questions):
        places = [i for i, question in enumerate(questions) if question.language == language]
        for i in places[:count]:
            lines += ["", f"user: {on_screen(questions[i].messages[-1]['content'])}"]
            for name, written in answers.items():
                lines.append(f"{name}: {on_screen(written[i].text)}" + ("" if written[i].ended else " [no EOS]"))
    return lines
