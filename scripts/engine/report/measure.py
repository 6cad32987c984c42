"""What is measured of every row of a file, for every model on the same rows: the raw values of report.json.

To add a format of rows: a function (Setup, Source, BadRows) -> section, listed in FORMS under its kind, and its metrics
in `report.metrics.METRICS`.
"""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from dataset.corpus.bundled import bundled_file
from dataset.reading.bad_rows import BadRows, OnBadRow
from dataset.reading.documents import read_documents
from dataset.rows.choice_formats import Question, read_questions
from dataset.rows.exercise_formats import key_of, read_exercises
from dataset.rows.formats import read_conversations
from dataset.rows.kinds import kinds_of_rows, note_on_explanations, note_on_others, refuse_unknown
from dataset.spelling import spelling_check
from dataset.tokenizer import PreTrainedTokenizerFast, encode
from model.decoding.autoregressive import SamplingConfig
from model.decoding.decode import ContinuationConfig
from model.decoding.denoiser import DenoisingConfig
from scripts.engine.decoding.answers import Answer, answer_all
from scripts.engine.files import or_none
from scripts.engine.likelihood import choices
from scripts.engine.likelihood.chain_rules import BOUND, ChainRuleConfig, chain_rules
from scripts.engine.likelihood.documents import add_nats, document_canvas, ends_given, reply_canvas
from scripts.engine.likelihood.windows import (
    DIFFUSION,
    DRAWN_MASKS,
    WHOLE_ROWS,
    DataEvalConfig,
    Document,
    Window,
    chosen_rows,
    reply_windows,
    report_skipped,
    windows_of,
)
from scripts.engine.loaded import Loaded, data_digest
from scripts.engine.prompts import Ask, PromptConfig
from scripts.engine.report.exercises import item_of, whole_couplets

BATCH_SIZE = 32  # of answers
WRITTEN = ("text", "num_tokens", "ended", "num_forward_passes", "seconds")  # what is kept of an answer

# What files hold, for the flags that depend on it.
IN_WORDS = "questions that are answered in words"
LIKELIHOODS = "text, conversations, multiple choice, poems or open questions"

Section = dict[str, Any]


@dataclass(frozen=True)
class MeasureConfig(ChainRuleConfig):
    """What is measured."""

    max_seq_len: Annotated[int, "longest sequence the models are given, in tokens", "--seq-len", "at least 2"] = 256
    max_rows: Annotated[
        int | None,
        "of each file a random sample of at most so many rows; of documents and conversations, as many as make so many "
        "sequences (none: all)",
        "at least 1",
    ] = None
    questions: Annotated[int, "a random sample of at most so many of each file", "at least 1", f"with {IN_WORDS}"] = (
        1000
    )
    eval_split: Annotated[
        Literal["all", "validation"],
        "validation: what training held out",
        "with --eval-data",
        "with text or conversations",
    ] = "all"
    val_fraction: Annotated[
        float, "share of the rows that training held out", "in [0, 1)", "with rows that training held out"
    ] = 0.005
    eval_batch_size: Annotated[int, "rows per forward pass", "at least 1", f"with {LIKELIHOODS}"] = 32
    num_samples: Annotated[
        int,
        "masks drawn per row for the bound",
        "--nmc",
        "at least 1",
        f"with {DIFFUSION}",
        f"with {LIKELIHOODS}",
        f"with {DRAWN_MASKS}",
    ] = 16
    canvas: Annotated[
        int,
        "tokens that a reply and its EOS stand on, as in scripts.eval.likelihood",
        "at least 0",
        f"with {DIFFUSION}",
        "with conversations",
        f"with {WHOLE_ROWS}",
    ] = 128
    eval_format: Annotated[
        Literal["auto", "choices", "poems", "open", "questions", "chat", "text"],
        "what the rows of the files are; auto = by the fields of the first ones",
        "with --eval-data",
    ] = "auto"
    on_bad_row: Annotated[OnBadRow, "with --eval-data"] = "error"
    batch_size: Annotated[
        int | None,
        f"questions answered together (none: {BATCH_SIZE}; 1 in the frontier, the speed of a single user)",
        "at least 1",
        f"with {IN_WORDS}",
    ] = None

    def choosing(self, source: "Source", limit: int | None) -> DataEvalConfig:
        """Selects at most `limit` rows of the file."""
        return DataEvalConfig(
            source.path, "text", source.split, self.val_fraction, 1, limit, num_samples=self.num_samples
        )

    @property
    def bad_rows(self) -> BadRows:
        """Return the collector of bad rows of one file."""
        return BadRows(self.on_bad_row)

    def scoring(self, source: "Source") -> DataEvalConfig:
        """Scores the rows that were selected."""
        return replace(self.choosing(source, None), eval_batch_size=self.eval_batch_size)


class Source(NamedTuple):
    """A file of one format."""

    name: str  # in the report
    path: Path
    form: str  # one of FORMS
    split: str = "all"  # or "validation": only the rows that training held out
    bundled: bool = False


@dataclass(frozen=True)
class Setup:
    """The models, in the order of the flags, and how questions are put to them."""

    models: dict[str, Loaded]
    tokenizer: PreTrainedTokenizerFast
    config: MeasureConfig
    prompting: PromptConfig
    continuation: ContinuationConfig
    sampling: SamplingConfig
    denoising: DenoisingConfig

    @property
    def asks(self) -> list[Ask]:
        """The ways in which questions are put: in the chat template or outside of it, both if the models differ."""
        ways = {self.prompting.wraps(loaded): self.prompting.asking(loaded) for loaded in self.models.values()}
        return list(ways.values())

    def sampler(self, name: str) -> SamplingConfig | DenoisingConfig:
        loaded = self.models[name]
        return self.sampling if loaded.kind == "autoregressive" else self.denoising.fitted(loaded.model.config)


def bundled_sources() -> list[Source]:
    return [
        Source("bundled questions", bundled_file("questions"), "questions", bundled=True),
        Source("bundled choices", bundled_file("choices"), "choices", bundled=True),
        Source("bundled documents, held out", bundled_file("pretrain"), "text", "validation", bundled=True),
        Source("bundled conversations, held out", bundled_file("sft"), "chat", "validation", bundled=True),
    ]


def sources_of(paths: Sequence[Path], config: MeasureConfig) -> list[Source]:
    """Raise ValueError for a file of no known format."""
    names = [path.name for path in paths]
    found = []
    for path in paths:
        form = form_of(path, config)
        name = path.name if names.count(path.name) == 1 else str(path)
        found.append(Source(name, path, form, config.eval_split if form in ("text", "chat") else "all"))
    return found


def form_of(path: Path, config: MeasureConfig) -> str:
    """The format of a file, that of --eval-format or that of its first rows. Raise ValueError if it is unknown."""
    kinds = kinds_of_rows(path, tuple(FORMS), config.bad_rows, config.eval_format)
    if not kinds:
        refuse_unknown(path, tuple(FORMS))
    note = "" if kinds[0] in ("text", "chat") else note_on_explanations(path)
    for line in (note_on_others(path, kinds, "--eval-format"), note):
        print(line, end="\n" if line else "", file=sys.stderr)
    return kinds[0]


def require_readable(sources: list[Source], config: MeasureConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise ValueError for a bad row that is not skipped, before the work begins."""
    for source in sources:
        for _ in FORMS[source.form].read(source.path, bad=config.bad_rows, check=spelling_check(tokenizer)):
            pass


def measure(setup: Setup, source: Source) -> Section:
    """Return a file's part of report.json: its items, sorted by their keys, and in `results` each model's values."""
    bad = setup.config.bad_rows
    section = {
        "name": source.name,
        "path": str(source.path),
        "format": source.form,
        "split": source.split,
        "bundled": source.bundled,
        "sha256": data_digest([source.path]),
        **FORMS[source.form].measure(setup, source, bad),
        **report_skipped(source.path, bad),
    }
    section["left_out"]["bad"] = bad.count
    print(f"{source.name}: {len(section['items']):,} rows of {source.form}", file=sys.stderr)
    order = sorted(range(len(section["items"])), key=lambda place: section["items"][place]["key"])
    section["items"] = [section["items"][place] for place in order]
    section["results"] = {name: [results[place] for place in order] for name, results in section["results"].items()}
    return section


# -- likelihood --------------------------------------------------------------------------------------------------------


def _measure_text(setup: Setup, source: Source, bad: BadRows) -> Section:
    """All models score the same tokens: control tokens only if all have learnt documents that hold them."""
    control = {loaded.control_tokens for loaded in setup.models.values()}
    if len(control) > 1:
        note = "some models were trained with --control-tokens, others were not: all are given plain text"
        print(f"{source.path}: {note}", file=sys.stderr)
    config = replace(setup.config.choosing(source, setup.config.max_rows), control_tokens=control == {True})
    canvases, limit = {name: document_canvas(loaded) for name, loaded in setup.models.items()}, setup.config.max_seq_len
    documents = {canvas: windows_of(setup.tokenizer, config, limit, bad, canvas) for canvas in {*canvases.values()}}
    windows = {name: documents[canvas][1] for name, canvas in canvases.items()}
    section = _likelihoods(setup, source, next(iter(documents.values()))[0], windows)
    told = [name for name, loaded in setup.models.items() if ends_given(loaded)]
    record = {"left_out": {}, "documents_hold_control_tokens": config.control_tokens, "documents_ends_given": told}
    return section | record


def _measure_chat(setup: Setup, source: Source, bad: BadRows) -> Section:
    """All models score the same replies, each on its own canvas."""
    config, limit = setup.config.choosing(source, setup.config.max_rows), setup.config.max_seq_len
    canvases = {name: reply_canvas(loaded, setup.config.canvas) for name, loaded in setup.models.items()}
    replies = {canvas: reply_windows(setup.tokenizer, config, limit, canvas, bad) for canvas in {*canvases.values()}}
    windows = {name: replies[canvas].windows for name, canvas in canvases.items()}
    same = next(iter(replies.values()))  # on every canvas
    section = _likelihoods(setup, source, same.conversations, windows)
    return section | {"left_out": {"too_long": same.too_long, "empty": same.empty}}


def _likelihoods(setup: Setup, source: Source, unscored: list[Document], windows: dict[str, list[Window]]) -> Section:
    """Documents without nats, and each model's windows -> their items and results."""
    keys = {}
    for window in next(iter(windows.values())):
        keys.setdefault(window.document, f"{window.seed:016x}")
    results = {}
    for name, loaded in setup.models.items():
        documents = [replace(document) for document in unscored]
        config = setup.config.scoring(source)
        add_nats(loaded, documents, windows[name], config)
        results[name] = [{"nats": d.nats, "variance": or_none(d.variance)} for d in documents]
        rules = chain_rules(loaded, documents, windows[name], config, setup.config.chain_rule_documents)
        for place in rules[BOUND]:
            results[name][place]["chain_rules"] = {rule: scored[place].nats for rule, scored in rules.items()}
    items = [
        {"key": keys[i], "lang": d.language, "bytes": d.bytes, "tokens": d.tokens} for i, d in enumerate(documents)
    ]
    return {"items": items, "results": results}


# -- multiple choice ---------------------------------------------------------------------------------------------------


def _measure_choices(setup: Setup, source: Source, bad: BadRows) -> Section:
    config, check = setup.config.choosing(source, setup.config.max_rows), spelling_check(setup.tokenizer)
    rows = (question for _, question in read_questions(source.path, bad=bad, check=check))
    sample = chosen_rows(rows, config, lambda question: question.content)
    questions, too_long = choices.questions_that_fit(setup.tokenizer, sample, setup.config.max_seq_len, setup.asks)
    _require_any(questions, setup, source)
    results = {}
    for name, loaded in setup.models.items():
        scores = choices.choice_nats(loaded, questions, setup.prompting.asking(loaded), setup.config.scoring(source))
        results[name] = [
            {"nats": s.nats.tolist(), "variance": [or_none(v) for v in s.variance.tolist()]} for s in scores
        ]
    items = [
        {"key": key_of(q.content), "lang": q.language, **q.labels}
        | {"question": q.text, "choices": q.choices, "answer": q.answer}
        for q in questions
    ]
    return {"items": items, "results": results, "left_out": {"too_long": too_long}}


# -- answers -----------------------------------------------------------------------------------------------------------


def _measure_exercises(setup: Setup, source: Source, bad: BadRows) -> Section:
    """Answers in words; of poems and open questions also the likelihood of the answer that the file gives."""
    limit = min(setup.config.questions, setup.config.max_rows or setup.config.questions)
    config, batch_size = setup.config.choosing(source, limit), setup.config.batch_size or BATCH_SIZE
    # 1. the complete rows  2. a random sample of them  3. those that fit the context; couplets whole or not at all
    rows = [row for _, row in read_exercises(source.path, source.form, bad=bad, check=spelling_check(setup.tokenizer))]
    complete = whole_couplets(rows, [row for row in rows if row.complete])
    sample = chosen_rows(complete, config, lambda row: row.couplet or f"{row.text}\n{row.reference}")
    sample = whole_couplets(complete, sample)
    if complete and not sample:
        raise ValueError(f"{source.path}: no couplet has as few as {limit} rows; raise --questions or --max-rows")
    sample.sort(key=lambda row: row.key)  # a question's seed follows its place, which must not be that in the file
    fitting = whole_couplets(sample, [row for row in sample if _fits(setup, row.text)])
    _require_any(fitting, setup, source)
    items = [item_of(row, setup.tokenizer) for row in fitting]
    results = {name: answers_of(setup, name, items, setup.sampler(name), batch_size) for name in setup.models}
    if source.form != "questions":
        _add_reference_nats(setup, source, items, results)
    left_out = {"too_long": len(sample) - len(fitting), "empty": len(rows) - len(complete)}
    return {"items": items, "results": results, "left_out": left_out, "batch_size": batch_size}


def answers_of(
    setup: Setup, name: str, items: list[dict], sampler: SamplingConfig | DenoisingConfig, batch_size: int
) -> list[dict[str, Any]]:
    """A model's answers to the questions of the items; the i-th is sampled with the seed plus i."""
    loaded = setup.models[name]
    prompts = [setup.prompting.prompt(item["question"], loaded) for item in items]
    return recorded(setup, answer_all(loaded, prompts, setup.continuation, sampler, batch_size, name))


def recorded(setup: Setup, answers: Iterable[Answer]) -> list[dict[str, Any]]:
    """Return what report.json holds of answers; if a model edits, also the edits, 0 of one that does not."""
    return [
        {name: getattr(answer, name) for name in WRITTEN}
        | ({"num_edits": answer.num_edits or 0} if setup.denoising.edits else {})
        | {"ids": encode(setup.tokenizer, answer.text)}
        for answer in answers
    ]


def _fits(setup: Setup, question: str) -> bool:
    """Return whether prompt and answer fit the context, in the template and as plain text if models differ in that."""
    room = setup.config.max_seq_len - setup.continuation.max_new_tokens
    prompts = [setup.prompting.prompt(question, loaded) for loaded in setup.models.values()]
    return all(len(prompt.encode(setup.tokenizer)) <= room for prompt in prompts)


def _add_reference_nats(setup: Setup, source: Source, items: list[dict], results: dict[str, list[dict]]) -> None:
    """Add the nats of the reference given the question, if both fit the context."""
    places, questions = [], []
    for place, item in enumerate(items):
        question = Question(item["question"], [item["reference"]], 0, item["lang"])
        if choices.questions_that_fit(setup.tokenizer, [question], setup.config.max_seq_len, setup.asks)[0]:
            places.append(place)
            questions.append(question)
    for name, loaded in setup.models.items() if questions else ():
        scores = choices.choice_nats(loaded, questions, setup.prompting.asking(loaded), setup.config.scoring(source))
        for place, score in zip(places, scores, strict=True):
            results[name][place]["reference_likelihood"] = {
                "nats": score.nats.item(),
                "variance": or_none(score.variance.item()),
                "tokens": score.tokens.item(),
            }


def _require_any(questions: list, setup: Setup, source: Source) -> None:
    if not questions:
        raise ValueError(
            f"{source.path}: no question fits --max-seq-len {setup.config.max_seq_len}; raise it, or lower "
            "--max-new-tokens"
        )


# -- formats -----------------------------------------------------------------------------------------------------------


class Form(NamedTuple):
    """A format of rows."""

    read: Callable[..., Iterable[Any]]  # (path, bad=, check=) -> its rows
    measure: Callable[[Setup, Source, BadRows], Section]
    description: str


def _exercises(form: str, description: str) -> Form:
    return Form(partial(read_exercises, form=form), _measure_exercises, description)


FORMS = {  # a row is of the first kind that it fits
    "choices": Form(read_questions, _measure_choices, "multiple choice by likelihood"),
    "poems": _exercises("poems", "lines of poems, the next and the one before"),
    "open": _exercises("open", "answers compared with a reference"),
    "questions": _exercises("questions", "answers that hold the right one, or not"),
    "chat": Form(read_conversations, _measure_chat, "replies and their EOS, given all before them"),
    "text": Form(read_documents, _measure_text, "documents: every token and the EOS"),
}
ANSWERED = ("questions", "poems", "open")  # formats of exercises
