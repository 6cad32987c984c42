"""What the report measures of every row of a file, for every model on the same rows: the raw values of report.json.

To add a format of rows: its fields and a function (Setup, Source, BadRows) -> section, listed in FORMS, and its
metrics in `report.metrics.METRICS`.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from dataset.bad_rows import BadRows, OnBadRow
from dataset.corpus.bundled import bundled_file
from dataset.formats import FORMATS as CONVERSATIONS
from dataset.formats import read_conversations
from dataset.jsonl import (
    JSON_TYPES,
    Check,
    content_hash,
    language_of,
    read_as,
    read_documents,
    read_rows,
    text_format,
)
from dataset.spelling import spelling_check
from dataset.tokenizer import PreTrainedTokenizerFast, encode
from model.decode import ContinuationConfig, DenoisingConfig, SamplingConfig
from scripts.engine.decoding.answers import Answer, answer_all
from scripts.engine.files import or_none
from scripts.engine.likelihood import choices
from scripts.engine.likelihood.documents import add_nats, reply_canvas
from scripts.engine.likelihood.windows import (
    DataEvalConfig,
    Document,
    ReplyCanvas,
    Window,
    chosen_rows,
    reply_windows,
    report_skipped,
    windows_of,
)
from scripts.engine.loaded import Loaded, data_digest
from scripts.engine.prompts import PromptConfig
from scripts.engine.runtime import RuntimeConfig

LABELS = ("split", "kind", "direction", "seen_in_pretrain")  # fields that rows may be told apart by
BATCH_SIZE = 32  # of answers
WRITTEN = ("text", "num_tokens", "ended", "num_forward_passes", "seconds")  # what is kept of an answer

Section = dict[str, Any]


@dataclass(frozen=True)
class MeasureConfig:
    """What is measured."""

    max_seq_len: Annotated[int, "longest sequence the models are given, in tokens", "--seq-len"] = 256
    max_rows: Annotated[
        int | None,
        "of each file a random sample of at most so many rows; of documents and conversations, as many as make so many "
        "sequences (none: all)",
    ] = None
    questions: Annotated[int, "of each file whose rows are answered, a random sample of at most so many"] = 1000
    eval_split: Annotated[
        Literal["all", "validation"], "--eval-data with text or conversations; validation: what training held out"
    ] = "all"
    val_fraction: Annotated[float, "share of the rows that training held out"] = 0.005
    eval_batch_size: Annotated[int, "rows per forward pass where likelihoods are computed"] = 32
    num_samples: Annotated[
        int, "diffusion: masks drawn per row for the bound; for blocks of up to 4 tokens all are tried", "--nmc"
    ] = 16
    canvas: Annotated[
        int, "conversations, diffusion: tokens that a reply and its EOS stand on, as in scripts.eval.likelihood"
    ] = 128
    on_bad_row: OnBadRow = "error"
    batch_size: Annotated[
        int | None, f"questions answered together (none: {BATCH_SIZE}; 1 in the frontier, the speed of a single user)"
    ] = None

    def __post_init__(self):
        for name in ("max_rows", "questions", "eval_batch_size", "num_samples", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(self, name)}")
        if self.max_seq_len < 2:
            raise ValueError(f"--max-seq-len {self.max_seq_len}: expected at least 2 tokens")
        if self.canvas < 0:
            raise ValueError(f"--canvas must not be negative, not {self.canvas}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction {self.val_fraction}: expected a share from 0 to below 1")

    def choosing(self, source: "Source", limit: int | None) -> DataEvalConfig:
        """Which rows of the file are taken: at most `limit`."""
        return DataEvalConfig(
            source.path, "text", source.split, self.val_fraction, 1, limit, num_samples=self.num_samples
        )

    @property
    def bad_rows(self) -> BadRows:
        """For one file."""
        return BadRows(self.on_bad_row)

    def scoring(self, source: "Source") -> DataEvalConfig:
        return replace(self.choosing(source, None), eval_batch_size=self.eval_batch_size)


class Source(NamedTuple):
    """A file of one format."""

    name: str
    path: Path
    form: str
    split: str = "all"
    bundled: bool = False


@dataclass(frozen=True)
class Setup:
    """The models, in the order given, and how they are asked."""

    models: dict[str, Loaded]
    tokenizer: PreTrainedTokenizerFast
    config: MeasureConfig
    prompting: PromptConfig
    continuation: ContinuationConfig
    sampling: SamplingConfig
    denoising: DenoisingConfig
    runtime: RuntimeConfig

    @property
    def wraps(self) -> set[bool]:
        """Whether questions are put into the chat template; both, where the models differ."""
        return {self.prompting.wraps(loaded) for loaded in self.models.values()}

    def sampler(self, name: str) -> SamplingConfig | DenoisingConfig:
        one = self.models[name]
        return self.sampling if one.kind == "autoregressive" else self.denoising.fitted(one.model.config)


def paths_in(names: str, flag: str) -> list[Path]:
    """The files of a comma-separated list. ValueError: a name is blank."""
    parts = [name.strip() for name in names.split(",")]
    if not all(parts):
        raise ValueError(f"{flag} {names!r} names no file in one place; give a file, or leave the comma out")
    return [Path(part) for part in parts]


def bundled_sources() -> list[Source]:
    return [
        Source("bundled questions", bundled_file("questions"), "questions", bundled=True),
        Source("bundled choices", bundled_file("choices"), "choices", bundled=True),
        Source("bundled documents, held out", bundled_file("pretrain"), "text", "validation", bundled=True),
        Source("bundled conversations, held out", bundled_file("sft"), "chat", "validation", bundled=True),
    ]


def sources_of(files: str, config: MeasureConfig) -> list[Source]:
    """The files of a comma-separated list. ValueError: a file given twice, or of no known format."""
    paths = paths_in(files, "--eval-data")
    names = [path.name for path in paths]
    found = []
    for path in paths:
        if [other.resolve() for other in paths].count(path.resolve()) > 1:
            raise ValueError(f"--eval-data: {path} is given twice; leave one out")
        form = form_of(path, config.bad_rows)
        name = path.name if names.count(path.name) == 1 else str(path)
        found.append(Source(name, path, form, config.eval_split if form in ("text", "chat") else "all"))
    return found


def form_of(path: Path, bad: BadRows | None = None) -> str:
    """The format of a file by the fields of its first row. ValueError: none known."""
    if text_format(path) == ".txt":
        return "text"
    number, first = next(read_rows(path, bad=bad))
    for name, form in FORMS.items():
        if any(first.keys() >= set(fields) for fields in form.fields):
            return name
    known = "; ".join(" or ".join(" + ".join(fields) for fields in form.fields) for form in FORMS.values())
    raise ValueError(
        f"{path}, row {number}: fields {', '.join(first) or 'none'} are of no known format; expected {known}"
    )


def require_readable(sources: list[Source], config: MeasureConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """ValueError for a bad row that is not skipped, before the work begins."""
    for source in sources:
        for _ in FORMS[source.form].read(source.path, bad=config.bad_rows, check=spelling_check(tokenizer)):
            pass


def measure(setup: Setup, source: Source) -> Section:
    """What report.json holds of a file: its items, sorted by their hash, and in `results` each model's values."""
    bad = setup.config.bad_rows
    section = {
        "name": source.name,
        "path": str(source.path),
        "format": source.form,
        "split": source.split,
        "bundled": source.bundled,
        "sha256": data_digest(source.path),
    } | FORMS[source.form].measure(setup, source, bad)
    section |= report_skipped(source.path, bad)
    section["left_out"]["bad"] = bad.count
    print(f"{source.name}: {len(section['items']):,} rows of {source.form}", file=sys.stderr)
    order = sorted(range(len(section["items"])), key=lambda i: section["items"][i]["key"])
    section["items"] = [section["items"][i] for i in order]
    section["results"] = {name: [made[i] for i in order] for name, made in section["results"].items()}
    return section


# -- likelihood --------------------------------------------------------------------------------------------------------


def _of_text(setup: Setup, source: Source, bad: BadRows) -> Section:
    """All models score the same tokens: control tokens only where all have learnt documents that hold them."""
    control = {loaded.control_tokens for loaded in setup.models.values()}
    if len(control) > 1:
        told = "some models were trained with --control-tokens, others were not: all are given plain text"
        print(f"{source.path}: {told}", file=sys.stderr)
    config = replace(setup.config.choosing(source, setup.config.max_rows), control_tokens=control == {True})
    documents, windows = windows_of(setup.tokenizer, config, setup.config.max_seq_len, bad)
    section = _likelihoods(setup, source, documents, dict.fromkeys(setup.models, windows))
    return section | {"left_out": {}, "documents_hold_control_tokens": config.control_tokens}


def _of_chat(setup: Setup, source: Source, bad: BadRows) -> Section:
    config, limit = setup.config.choosing(source, setup.config.max_rows), setup.config.max_seq_len
    found = {  # all score the same replies, diffusion models on a canvas
        canvas: reply_windows(setup.tokenizer, config, limit, canvas, bad)
        for canvas in {_canvas(setup, n) for n in setup.models}
    }
    windows = {name: found[_canvas(setup, name)].windows for name in setup.models}
    any_of = next(iter(found.values()))
    section = _likelihoods(setup, source, any_of.conversations, windows)
    return section | {"left_out": {"too_long": any_of.too_long, "empty": any_of.empty}}


def _canvas(setup: Setup, name: str) -> ReplyCanvas:
    return reply_canvas(setup.models[name], setup.config.canvas)


def _likelihoods(setup: Setup, source: Source, blank: list[Document], windows: dict[str, list[Window]]) -> Section:
    """Documents without nats, and each model's windows -> their items and results."""
    keys = {}
    for window in next(iter(windows.values())):
        keys.setdefault(window.document, f"{window.seed:016x}")
    results = {}
    for name, loaded in setup.models.items():
        documents = [replace(document) for document in blank]
        add_nats(loaded, documents, windows[name], setup.config.scoring(source))
        results[name] = [{"nats": d.nats, "variance": or_none(d.variance)} for d in documents]
    items = [
        {"key": keys[i], "lang": d.language, "bytes": d.bytes, "tokens": d.tokens} for i, d in enumerate(documents)
    ]
    return {"items": items, "results": results}


# -- multiple choice ---------------------------------------------------------------------------------------------------


def _of_choices(setup: Setup, source: Source, bad: BadRows) -> Section:
    config, check = setup.config.choosing(source, setup.config.max_rows), spelling_check(setup.tokenizer)
    labels = {}

    def labelled(row: dict[str, Any]) -> choices.Question:
        question = choices.question_of(row, check)
        labels[question.content] = _labels(row)
        return question

    rows = (question for _, question in read_as(source.path, labelled, bad=bad))
    chosen = chosen_rows(rows, config, lambda question: question.content)
    asked, too_long = choices.questions_that_fit(setup.tokenizer, chosen, setup.config.max_seq_len, setup.wraps)
    _require_some(source, setup, asked)
    results = {}
    for name, loaded in setup.models.items():
        wrap, config = setup.prompting.wraps(loaded), setup.config.scoring(source)
        scored = choices.choice_nats(loaded, asked, wrap, config)
        results[name] = [
            {"nats": one.nats.tolist(), "variance": [or_none(v) for v in one.variance.tolist()]} for one in scored
        ]
    items = [
        {"key": _key(q.content), "lang": q.language, **labels[q.content]}
        | {"question": q.text, "choices": q.choices, "answer": q.answer}
        for q in asked
    ]
    return {"items": items, "results": results, "left_out": {"too_long": too_long}}


# -- answers -----------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """A question to be answered in words."""

    row: int  # of the file
    text: str
    reference: str
    wanted: str | None  # what a right answer holds, as words of its own
    language: str
    labels: dict[str, str]
    couplet: str | None = None  # of a poem's lines, the same in either direction

    @property
    def complete(self) -> bool:
        """Whether there is a question, and an answer to compare with."""
        return all(text is None or bool(text.strip()) for text in (self.text, self.reference, self.wanted))


def read_asked(path: Path, form: str, bad: BadRows | None = None, check: Check = str) -> Iterator[Asked]:
    """The questions of a file of poems, questions or open questions, as `read_as`; a row is bad of whose texts
    check(text) raises ValueError, too."""
    for number, asked in read_as(path, partial(_asked_of, form=form, check=check), bad=bad):
        yield asked._replace(row=number)


def _asked_of(row: dict[str, Any], form: str, check: Check) -> Asked:
    reference = "reference" if form == "open" else "answer"
    more = ["prompt"] if form == "poems" else []
    for name in ("question", reference, *more, *(["final"] if "final" in row else ())):
        value = row.get(name)
        if not isinstance(value, str):
            found = JSON_TYPES[type(value)] if name in row else "missing"
            raise ValueError(f'field "{name}" is {found}, expected a text; correct the row')
        check(value)
    if form == "poems" and row.get("direction") not in ("forward", "backward"):
        raise ValueError(f'field "direction" is {row.get("direction")!r}, expected "forward" or "backward"')
    language = row.get("lang")
    if not isinstance(language, str):
        language = language_of(row["question"] + row[reference])
    wanted = None if form == "open" else row.get("final", row["answer"]).strip()
    couplet = _key("\n".join(sorted((row["prompt"], row["answer"])))) if form == "poems" else None
    return Asked(0, row["question"], row[reference], wanted, language, _labels(row), couplet)


def _of_asked(setup: Setup, source: Source, bad: BadRows) -> Section:
    """Answers in words; of poems and open questions also the likelihood of the answer that is given."""
    limit = min(setup.config.questions, setup.config.max_rows or setup.config.questions)
    found = list(read_asked(source.path, source.form, bad, spelling_check(setup.tokenizer)))
    whole = _whole_couplets(found, [asked for asked in found if asked.complete])
    told_apart = setup.config.choosing(source, limit), lambda asked: asked.couplet or f"{asked.text}\n{asked.reference}"
    rows = _whole_couplets(whole, chosen_rows(whole, *told_apart))
    if whole and not rows:
        raise ValueError(f"{source.path}: no couplet has as few as {limit} rows; raise --questions or --max-rows")
    rows.sort(key=_asked_key)  # a question's seed follows its place, which must not be that in the file
    fitting = _whole_couplets(rows, [asked for asked in rows if _fits(setup, asked)])
    _require_some(source, setup, fitting)
    items = [_asked_item(setup.tokenizer, asked) for asked in fitting]
    batch_size = setup.config.batch_size or BATCH_SIZE
    results = {name: answers_of(setup, name, items, setup.sampler(name), batch_size) for name in setup.models}
    if source.form != "questions":
        _add_reference_nats(setup, source, items, results)
    left_out = {"too_long": len(rows) - len(fitting), "empty": len(found) - len(whole)}
    return {"items": items, "results": results, "left_out": left_out, "batch_size": batch_size}


def _whole_couplets(rows: list[Asked], kept: list[Asked]) -> list[Asked]:
    """Of `kept` what is no poem, and the couplets of which all rows are kept: both directions or neither."""
    numbers = {asked.row for asked in kept}
    cut = {asked.couplet for asked in rows if asked.couplet and asked.row not in numbers}
    return [asked for asked in kept if asked.couplet not in cut]


def answers_of(
    setup: Setup, name: str, items: list[dict], config: SamplingConfig | DenoisingConfig, batch_size: int
) -> list[dict[str, Any]]:
    """A model's answers to the questions of the items; the i-th is sampled with the seed plus i."""
    loaded = setup.models[name]
    prompts = [setup.prompting.prompt(item["question"], loaded) for item in items]
    answers = answer_all(loaded, prompts, setup.continuation, config, batch_size, name)
    return recorded(setup, answers)


def recorded(setup: Setup, answers: Iterable[Answer]) -> list[dict[str, Any]]:
    return [
        {name: getattr(answer, name) for name in WRITTEN} | {"ids": encode(setup.tokenizer, answer.text)}
        for answer in answers
    ]


def _fits(setup: Setup, asked: Asked) -> bool:
    """Whether prompt and answer are within the context, however the models are asked."""
    room = setup.config.max_seq_len - setup.continuation.max_new_tokens
    prompts = [setup.prompting.prompt(asked.text, loaded) for loaded in setup.models.values()]
    return all(len(prompt.encode(setup.tokenizer)) <= room for prompt in prompts)


def _asked_item(tokenizer: PreTrainedTokenizerFast, asked: Asked) -> dict[str, Any]:
    wanted = {} if asked.wanted is None else {"wanted": asked.wanted}
    return {
        "key": _asked_key(asked),
        "lang": asked.language,
        **asked.labels,
        **({"couplet": asked.couplet} if asked.couplet else {}),
        "question": asked.text,
        "reference": asked.reference,
        **wanted,
        "reference_tokens": len(encode(tokenizer, asked.reference)) + 1,
    }


def _add_reference_nats(setup: Setup, source: Source, items: list[dict], results: dict[str, list[dict]]) -> None:
    """Nats of the reference given the question, where both fit the context."""
    questions = [choices.Question(item["question"], [item["reference"]], 0, item["lang"]) for item in items]
    fits = [
        bool(choices.questions_that_fit(setup.tokenizer, [question], setup.config.max_seq_len, setup.wraps)[0])
        for question in questions
    ]
    places = [place for place, fit in enumerate(fits) if fit]
    if not places:
        return
    for name, loaded in setup.models.items():
        some, wrap = [questions[place] for place in places], setup.prompting.wraps(loaded)
        scored = choices.choice_nats(loaded, some, wrap, setup.config.scoring(source))
        for place, one in zip(places, scored, strict=True):
            results[name][place]["reference_likelihood"] = {
                "nats": one.nats.item(),
                "variance": or_none(one.variance.item()),
                "tokens": one.tokens.item(),
            }


def _require_some(source: Source, setup: Setup, left: list) -> None:
    if not left:
        raise ValueError(
            f"{source.path}: no question fits --max-seq-len {setup.config.max_seq_len}; raise it, or lower "
            "--max-new-tokens"
        )


def _asked_key(asked: Asked) -> str:
    return _key("\n".join([asked.text, asked.reference, asked.wanted or "", asked.language, *asked.labels.values()]))


def _key(content: str) -> str:
    return f"{content_hash(content):016x}"


def _labels(row: dict[str, Any]) -> dict[str, str]:
    return {name: str(row[name]) for name in LABELS if isinstance(row.get(name), str | bool)}


class Form(NamedTuple):
    """A format of rows."""

    fields: tuple[tuple[str, ...], ...]  # that a row has: all of one tuple
    read: Callable[..., Iterable[Any]]  # (path, bad=, check=): its rows
    measure: Callable[[Setup, Source, BadRows], Section]
    told: str


FORMS = {  # of the formats that a row fits the first is taken
    "text": Form((("text",),), read_documents, _of_text, "documents: every token and the EOS"),
    "choices": Form((("question", "choices"),), choices.read_questions, _of_choices, "multiple choice by likelihood"),
    "poems": Form(
        (("prompt", "answer", "direction", "question"),),
        partial(read_asked, form="poems"),
        _of_asked,
        "lines of poems, the next and the one before",
    ),
    "open": Form(
        (("question", "reference"),), partial(read_asked, form="open"), _of_asked, "answers compared with a reference"
    ),
    "questions": Form(
        (("question", "answer"),),
        partial(read_asked, form="questions"),
        _of_asked,
        "answers that hold the right one, or not",
    ),
    "chat": Form(
        tuple(form.fields for form in CONVERSATIONS.values()),
        read_conversations,
        _of_chat,
        "replies and their EOS, given all before them",
    ),
}
ANSWERED = ("questions", "poems", "open")  # in words
