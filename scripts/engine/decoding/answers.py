"""Answers to prompts, and what can be said of them without a judge: variety, loops, endings, cost."""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dataset.jsonl import BadRows, content_hash, language_of
from dataset.sft import Messages, read_conversations
from dataset.spelling import spelling_check
from dataset.tokenizer import PreTrainedTokenizerFast, encode, encode_chat, render_chat
from model.decode import ContinuationConfig, DenoisingConfig, autoregress, denoise
from scripts.engine.decoding.generation import Sampler, canvas_of_prompts, first_seed, generate_batch
from scripts.engine.decoding.trace_terminal import on_screen
from scripts.engine.likelihood.documents import window_nats
from scripts.engine.likelihood.windows import DataEvalConfig, Window
from scripts.engine.loaded import Loaded
from scripts.engine.prompts import Prompt
from scripts.engine.statistics import distinct, longest_repeat, mean_and_error, ratio_error

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
)
PREMATURE = 0.25  # of the reference's length; an answer that ends below it ended too early
WARM_UP = 4  # steps


@dataclass(frozen=True)
class Question:
    """A conversation up to its last reply, and that reply."""

    messages: Messages | str  # or, to a model of plain text, the text itself
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
    judged_nats: float | None = None  # what a judge, an autoregressive model, makes of it and its EOS; see `judge`
    judged_tokens: int = 0


def questions_of(
    path: Path,
    tokenizer: PreTrainedTokenizerFast,
    per_language: int,
    max_new_tokens: int,
    max_length: int,
    bad: BadRows | None = None,
) -> tuple[list[Question], dict[str, int]]:
    """Up to `per_language` questions in each language, chosen by content hash among those that fit, and how many rows
    there are ("rows") and different ones that fit, per language. ValueError names file and row, or if none fits.

    A question fits if the prompt and `max_new_tokens` are within `max_length` and its reference, EOS included, within
    `max_new_tokens`: no answer is cut that the reference shows to be short enough. A reply that is empty or replies to
    nothing is no reference.
    """
    fitting: dict[str, dict[int, Question]] = {}
    rows = 0
    for _, messages in read_conversations(path, None, bad, spelling_check(tokenizer)):
        rows += 1
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        prompt, reference = messages[:last], messages[last]["content"]
        if not prompt or not reference.strip():
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


def note_on_template(loaded: Loaded, wraps: bool) -> str | None:
    """A sentence for checkpoints to which a prompt means something else than one might think."""
    if loaded.chat:
        return None
    effect = "the chat template is new to it" if wraps else "it goes on with the text that it is given"
    return f"{loaded.path} was not trained on conversations: {effect}"


def warm_up(loaded: Loaded, prompts: Sequence[Prompt], continuation: ContinuationConfig, sampler: Sampler) -> None:
    """Take the first steps of an answer on the canvas that will be timed: the first of a new shape are slower."""
    canvas = canvas_of_prompts(loaded, prompts, continuation.max_new_tokens)
    steps = denoise if isinstance(sampler, DenoisingConfig) else autoregress
    with loaded.runtime.autocast():
        for _ in itertools.islice(steps(loaded.model.eval(), canvas, sampler, [0] * len(prompts)), WARM_UP):
            pass


def references(tokenizer: PreTrainedTokenizerFast, questions: Sequence[Question]) -> list[Answer]:
    sizes = [len(encode(tokenizer, question.reference)) + 1 for question in questions]
    return [Answer(q.reference, size, True) for q, size in zip(questions, sizes, strict=True)]


def answer_all(
    loaded: Loaded,
    questions: list[Question],
    name: str,
    batch_size: int,
    continuation: ContinuationConfig,
    sampler: Sampler,
) -> list[Answer]:
    """The answers of one sampler, in batches. Question i is sampled with the seed plus i, whatever its batch."""
    prompts = [Prompt(question.messages) for question in questions]
    continuation = with_seed(loaded, continuation, len(prompts))
    warm_up(loaded, prompts[:batch_size], continuation, sampler)
    answers: list[Answer] = []
    for first in tqdm(range(0, len(prompts), batch_size), desc=name, disable=not sys.stderr.isatty()):
        batch = prompts[first : first + batch_size]
        seeded = replace(continuation, gen_seed=continuation.gen_seed + first)
        answers += answer_batch(loaded, batch, seeded, sampler)
    return answers


def with_seed(loaded: Loaded, continuation: ContinuationConfig, count: int) -> ContinuationConfig:
    """The continuation with a seed of its own, such that the seeds of `count` rows after it are seeds, too."""
    return replace(continuation, gen_seed=first_seed(loaded, continuation) % (2**32 - count))


def answer_batch(
    loaded: Loaded, prompts: Sequence[Prompt], continuation: ContinuationConfig, sampler: Sampler
) -> list[Answer]:
    """The answers to prompts that share forward passes, each with its share of the seconds."""
    return [
        Answer(g.text, g.num_tokens, g.ended, g.num_forward_passes, g.seconds / len(prompts))
        for g in generate_batch(loaded, prompts, continuation, sampler)
    ]


def judge(loaded: Loaded, questions: list[Question], answers: list[Answer]) -> list[Answer]:
    """The answers with their nats under an autoregressive model, given their prompts: what it would find odd costs
    much. Text that repeats itself costs little; look at longest_repeat, too."""
    windows = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        prompt = encode_chat(loaded.tokenizer, question.messages, True)
        reply = encode(loaded.tokenizer, answer.text) + [loaded.tokenizer.eos_token_id] * answer.ended
        windows.append(Window(number, (prompt + reply)[: loaded.max_length], 0, len(prompt)))
    written = [window for window in windows if len(window.ids) > window.begin]  # nothing was written, not even EOS
    nats, _ = window_nats(loaded, written, DataEvalConfig())
    costs = {window.document: cost for window, cost in zip(written, nats.tolist(), strict=True)}
    return [
        replace(answer, judged_nats=costs.get(number, 0.0), judged_tokens=len(window.ids) - window.begin)
        for number, (answer, window) in enumerate(zip(answers, windows, strict=True))
    ]


def figures_of(
    tokenizer: PreTrainedTokenizerFast, answers: dict[str, list[Answer]], questions: Sequence[Question]
) -> dict[str, dict[str, dict[str, Any]]]:
    """sampler -> language -> `describe` of its answers; the references are among the answers."""
    figures: dict[str, dict[str, dict[str, Any]]] = {}
    for name, made in answers.items():
        for language in dict.fromkeys(question.language for question in questions):
            pairs = zip(made, answers["reference"], questions, strict=True)
            chosen = [(answer, reference) for answer, reference, question in pairs if question.language == language]
            figures.setdefault(name, {})[language] = describe(tokenizer, *zip(*chosen, strict=True))
    return figures


def describe(
    tokenizer: PreTrainedTokenizerFast, answers: Sequence[Answer], reference: Sequence[Answer]
) -> dict[str, Any]:
    """Figures of a set of answers to questions with these references; pairs are a mean over the answers and its
    standard error.

    distinct_n: distinct token n-grams / all n-grams, over all answers together; it falls as there are more of them.
    longest_repeat: length of the longest token sequence that an answer contains twice, as a share of the answer.
    premature: ended below a quarter of the reference's length. overrun: did not end. Tokens count up to EOS, that
    included. judged: nats per token under a judge and their standard error. What was not computed, as references,
    has no cost (None).
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
        "premature": mean_and_error([float(is_premature(a, r)) for a, r in zip(answers, reference, strict=True)]),
        "overrun": mean_and_error([float(not answer.ended) for answer in answers]),
        "judged": _judged(answers),
        "forward_passes": mean_and_error([answer.num_forward_passes for answer in answers]) if passes else None,
        "tokens_per_pass": tokens / passes if passes else None,
        "tokens_per_second": tokens / seconds if seconds else None,
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
    """One line per sampler and language."""
    rows = [["", "", *COLUMNS]]
    for name, groups in figures.items():
        rows += [[name, language, *(cell(group[column]) for column in COLUMNS)] for language, group in groups.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{text:<{width}}" if i < 2 else f"{text:>{width}}" for i, (text, width) in enumerate(pairs))
        for pairs in (zip(row, widths, strict=True) for row in rows)
    ]
    return [
        *lines,
        "mean +- standard error over the answers; distinct_n: of all answers together; longest_repeat: share of an "
        "answer; premature: ended below a quarter of the reference; overrun: no end; judged: nats per token under "
        "--judge; tokens count up to EOS",
    ]


def cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, tuple):
        mean, error = value
        return f"{mean:.2f}" + ("" if error is None else f" +- {error:.2f}")
    return f"{value:.3f}" if value < 10 else f"{value:.1f}"


def samples(answers: dict[str, list[Answer]], questions: list[Question], count: int) -> list[str]:
    """The first `count` questions of each language with every sampler's answer."""
    lines = []
    for language in dict.fromkeys(question.language for question in questions):
        chosen = [i for i, question in enumerate(questions) if question.language == language][:count]
        for i in chosen:
            lines += ["", f"user: {on_screen(questions[i].messages[-1]['content'])}"]
            lines += [
                f"{name}: {on_screen(made[i].text)}" + ("" if made[i].ended else " [no EOS]")
                for name, made in answers.items()
            ]
    return lines
