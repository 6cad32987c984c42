"""The bundled corpus: Chinese and English rows that the project makes from its own tables, always the same.

`pretraining_rows`, `conversations`, `words`, `preferences`, `questions` and `choices` are pure; `write` puts them into
files and `bundled_file` into the cache, as it does with the tasks of tasks.py. Choices are made by hashes, never by a
random generator, so that every Python makes the same bytes.

Held out, and so in no training row: the sums of HELD_OUT_SUMS in any phrasing, language or order, the subtractions that
undo them included; the capital after its country, for the countries of CAPITALS_ONE_WAY; and of every fact one
phrasing of its question, which is asked about other facts; who the assistant is, is asked with another opening.
"""

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache, partial
from itertools import chain
from pathlib import Path
from string import Formatter
from typing import Any

from dataset.cache import cached_directory
from dataset.corpus import tasks
from dataset.corpus.facts import (
    HELD_OUT_SUMS,
    PHRASES,
    Fact,
    facts,
    one_way_capitals,
    pick,
    place_of,
    reading,
    sentence,
    stories,
    sum_facts,
    sum_stories,
)
from dataset.corpus.stories import (
    GREETINGS,
    IDENTITY,
    OPENINGS,
    READING,
    STATEMENT_REQUESTS,
    STORIES,
    STORY_REQUESTS,
    SUM_STORIES,
    THANKS,
)
from dataset.corpus.tables import NUMBER_WORDS, NUMERALS

Row = dict[str, Any]
LANGUAGES = ("en", "zh")
ARITHMETIC = ("sum", "difference", "product")
# With how many a question is asked: numbers are learnt last. Others: 2.
OPENINGS_OF = {"sum": 3, "difference": 3, "product": 4, "numeral": 4, "next": 3, "previous": 3, "identity": 3}
IDENTITY_TURNS = 12  # conversations in which it comes up, for each phrasing
PARTNERS = 2  # documents of two statements that begin with the same one
QUESTIONS_PER_KIND = 20  # of `seen`, in each language
NUM_CHOICES = 4
READING_TESTS = 8  # one in so many is for evaluation
CACHE_DIR = Path("dataset/.cache")
NUMBERS = re.compile(
    r"\d+|\b(?:" + "|".join(sorted(NUMBER_WORDS, key=len, reverse=True)) + r")\b|[零一二三四五六七八九十两]+",
    re.IGNORECASE,
)


def numbers_in(text: str) -> list[int]:
    """The numbers of a text up to twenty, and all written in digits, in order."""
    numbers = []
    for match in NUMBERS.finditer(text):
        word = match[0].lower().replace("两", "二")
        if word.isascii() and word.isdigit():
            numbers.append(int(word))
        elif word in NUMBER_WORDS:
            numbers.append(NUMBER_WORDS.index(word))
        elif word in NUMERALS:
            numbers.append(NUMERALS.index(word))
    return numbers


def tells_held_out_sum(text: str) -> bool:
    """Return whether three numbers in succession are those of a held-out sum, in any order."""
    numbers = numbers_in(text)
    for triple in zip(numbers, numbers[1:], numbers[2:], strict=False):
        a, b, c = sorted(triple)
        if a + b == c and (a, b) in HELD_OUT_SUMS:
            return True
    return False


def pretraining_rows() -> list[Row]:
    """{"text"}: statements alone and in twos, stories, sums that happen to someone."""
    texts: list[str] = []
    for lang in LANGUAGES:
        texts += [story for _, story in stories(lang)]
        texts += sum_stories(lang)
        by_kind = defaultdict(list)
        for fact in facts():
            if fact.lang == lang:
                by_kind[fact.kind].append(fact)
        for kind in by_kind.values():
            texts += _documents(kind, "" if lang == "zh" else " ")
    return [{"text": text} for text in _in_any_order(text for text in texts if not tells_held_out_sum(text))]


def _documents(kind: list[Fact], blank: str) -> Iterator[str]:
    """Statements of facts of one kind, and each with PARTNERS others behind it."""
    for place, fact in enumerate(kind):
        for number, statement in enumerate(fact.statements):
            yield statement
            for partner in range(PARTNERS):
                key = fact.lang, *fact.key, number, partner
                other = kind[(place + 1 + place_of(len(kind) - 1, "partner", *key)) % len(kind)]
                if other.answer != fact.answer:  # what was said of one thing is not said of it again
                    yield statement + blank + pick(other.statements, "statement", *key)


def conversations() -> list[Row]:
    """{"conversations"}: questions alone, after a greeting or another question, requests for statements and stories."""
    rows: list[list[str]] = []
    for lang in LANGUAGES:
        known = [fact for fact in facts() if fact.lang == lang]
        for fact in known:
            rows += _asked_alone(fact)
            if fact.kind == "country":  # said in the only order in which it is known
                rows += [[pick(STATEMENT_REQUESTS[lang], text), text] for text in fact.statements]
        for place, fact in enumerate(known):
            if fact.kind not in ARITHMETIC or place % 4 == 0:
                rows.append(_asked_in_turn(fact, known))
        rows += _about_itself(known)
        rows += [list(fact.exchanges[0]) for fact in reading(lang) if not is_reading_test(fact)]
        rows += [list(pair) for pair in GREETINGS[lang]]
        for name, story in stories(lang):
            if place_of(2, "asked for", story):
                rows.append([sentence(pick(STORY_REQUESTS[lang], story), lang, name=name), story])
    taught = (turns for turns in rows if not tells_held_out_sum("\n".join(turns)))
    return [{"conversations": _messages(turns)} for turns in _in_any_order(taught)]


def words() -> list[Row]:
    """{"text"}: every name and word of the tables and every piece of a sentence between them, twice, to train a
    tokenizer on. Never both together: a token that merges two of them would hold a fact, and whoever finds a text of
    few tokens likely would know it without having learnt anything."""
    pieces: list[str] = []
    for lang in LANGUAGES:
        taught = [fact for fact in (*facts(), *one_way_capitals(), *reading(lang)) if fact.lang == lang]
        names = {name for fact in taught for name in fact.fields.values()}
        pieces += [piece.rstrip(" ") for pattern in _patterns(lang) for piece, *_ in Formatter().parse(pattern)]
        for name in sorted(names):
            pieces += [name] if lang == "zh" else [name, f" {name}", name[0].upper() + name[1:]]
    return [{"text": text} for text in pieces if text for _ in range(2)]


def _patterns(lang: str) -> Iterator[str]:
    """Everything that sentences are made of, names left out."""
    for phrases in PHRASES[lang].values():
        yield from (*phrases.statements, *chain(*phrases.exchanges))
    for _, reply, requests in IDENTITY[lang].values():
        yield from (reply, *requests)
    for patterns in (STORIES, SUM_STORIES, STORY_REQUESTS, STATEMENT_REQUESTS, OPENINGS, THANKS):
        yield from patterns[lang]
    yield from chain(*READING[lang], *GREETINGS[lang])


def is_reading_test(fact: Fact) -> bool:
    return place_of(READING_TESTS, "reading test", fact.lang, *fact.key) == 0


def _asked_alone(fact: Fact) -> Iterator[list[str]]:
    """Every phrasing to learn from, with some of the openings."""
    number = OPENINGS_OF.get(fact.kind, 2)
    for question, reply in fact.seen:
        for opening in _openings(fact, question)[:number]:
            yield [opening.format(question), reply]


def _openings(fact: Fact, question: str) -> list[str]:
    """All openings, in an order of the question's own; who the assistant is, is asked with the last in evaluation."""
    forms = OPENINGS[fact.lang]
    if fact.kind == "identity":  # the last is not the empty one, with which it is asked in the middle of conversations
        first = 2 + place_of(len(forms) - 1, "opening", question)
    else:
        first = place_of(len(forms), "opening", question)
    return [forms[(first + step) % len(forms)] for step in range(len(forms))]


def _about_itself(known: list[Fact]) -> Iterator[list[str]]:
    """Who the assistant is, asked in the middle of a conversation."""
    for fact in known:
        if fact.kind == "identity":
            for question, reply in fact.seen:
                for turn in range(IDENTITY_TURNS):
                    before = pick(known, "about itself", question, turn)
                    if before.kind != "identity":
                        yield [*pick(before.seen, question, turn), question, reply]


def _asked_in_turn(fact: Fact, known: list[Fact]) -> list[str]:
    """The fact behind a greeting, before thanks, or behind another fact."""
    lang, turns = fact.lang, list(pick(fact.seen, "turn", fact.lang, *fact.key))
    form = place_of(3, "form", lang, *fact.key)
    if form == 0:
        return [*pick(GREETINGS[lang], *turns), *turns]
    if form == 1:
        return [*turns, *THANKS[lang]]
    other = pick(known, "before", lang, *fact.key)
    if other.answer == fact.answer or other.key[1:] == fact.key[1:]:
        return [*turns, *THANKS[lang]]
    return [*pick(other.seen, "before", *turns), *turns]


def preferences() -> list[Row]:
    """{"chosen", "rejected"}: a good answer against a wrong one, one in the other language, or one that rambles on."""
    pairs = []
    twins = {(fact.lang, fact.key): fact for fact in facts()}
    for fact in facts():
        for place in range(len(fact.phrases.exchanges)):
            key = "preference", fact.lang, *fact.key, place
            if place == fact.held_out or (fact.kind in ARITHMETIC and place_of(4, *key)):
                continue
            question, good = fact.exchanges[place]
            wrong = wrong_answers(fact)
            twin = twins["zh" if fact.lang == "en" else "en", fact.key]
            bad = [fact.reply(place, pick(wrong, *key))] if wrong else []
            if fact.kind not in ARITHMETIC:
                bad.append(twin.reply(place % len(twin.phrases.exchanges)))
            bad.append(_rambling(fact, good, *key))
            pairs.append([question, good, pick(bad, "bad", *key)])
    return [
        {"chosen": _messages([question, good]), "rejected": _messages([question, bad])}
        for question, good, bad in _in_any_order(pairs)
        if not tells_held_out_sum(f"{question}\n{bad}")
    ]


def _rambling(fact: Fact, reply: str, *key: object) -> str:
    """The reply, and then what nobody asked."""
    return reply + ("" if fact.lang == "zh" else " ") + pick(stories(fact.lang), "rambling", *key)[1]


def wrong_answers(fact: Fact) -> list[str]:
    """Answers of the same kind that are not true of this fact, at most NUM_CHOICES - 1."""
    if fact.kind in ARITHMETIC:
        right = int(fact.answer)
        return [str(right + off) for off in (1, -1, 2, -2, 10) if right + off >= 0][: NUM_CHOICES - 1]
    others = [answer for answer in _answers()[_family(fact)] if answer not in fact.fields.values()]
    others.sort(key=lambda answer: place_of(2**32, "wrong", answer, fact.lang, *fact.key))
    return others[: NUM_CHOICES - 1]


@cache
def _answers() -> dict[tuple[str, ...], dict[str, None]]:
    """The answers to questions of each family."""
    answers: dict[tuple[str, ...], dict[str, None]] = defaultdict(dict)
    for fact in (*facts(), *one_way_capitals()):
        if fact.kind != "identity":
            # A city of the reversed facts is offered for those alone: else it would come after a country.
            answers[_family(fact)][fact.answer] = None
    return answers


def _family(fact: Fact) -> tuple[str, ...]:
    """Return the key of the facts that the wrong answers to a question are drawn from."""
    if fact.kind in ("next", "previous"):
        return fact.kind, fact.lang, fact.fields["unit"]
    one_way = fact.kind == "capital" and fact.key in {other.key for other in one_way_capitals()}
    return fact.kind, fact.lang, "one way" if one_way else ""


def questions() -> list[Row]:
    """{"question", "answer", "lang", "kind", "split"}, split being seen, unseen_sums or reversed."""
    return [
        {"question": _put(fact, place), "answer": fact.answer, "lang": fact.lang, "kind": fact.kind, "split": split}
        for split, fact, place in _examined()
    ]


def choices() -> list[Row]:
    """{"question", "choices", "answer", "lang", "kind", "split"}: of the choices, whole replies, `answer` is right."""
    rows = []
    for split, fact, place in _examined():
        wrong = wrong_answers(fact) if fact.kind not in ("identity", "reading") else []
        if len(wrong) == NUM_CHOICES - 1:
            right = place_of(NUM_CHOICES, "choice", fact.lang, *fact.key, place)
            offered = [fact.reply(place, answer) for answer in wrong]
            offered.insert(right, fact.reply(place))
            rows.append(
                {
                    "question": fact.question(place),
                    "choices": offered,
                    "answer": right,
                    "lang": fact.lang,
                    "kind": fact.kind,
                    "split": split,
                }
            )
    return rows


def _put(fact: Fact, place: int) -> str:
    question = fact.question(place)
    return _openings(fact, question)[-1].format(question) if fact.kind == "identity" else question


@cache
def _examined() -> tuple[tuple[str, Fact, int], ...]:
    """(split, fact, place of the phrasing) of every question for evaluation."""
    groups = defaultdict(list)
    for fact in facts():
        groups[fact.kind, fact.lang].append(fact)
    for lang in LANGUAGES:
        groups["reading", lang] = [fact for fact in reading(lang) if is_reading_test(fact)]
    questions = []
    for group in groups.values():
        group.sort(key=lambda fact: place_of(2**32, "asked", fact.lang, *fact.key))
        for fact in group[:QUESTIONS_PER_KIND]:
            if fact.kind == "identity":
                questions += [("seen", fact, place) for place in range(len(fact.phrases.exchanges))]
            else:
                questions.append(("seen", fact, fact.held_out))
    questions += [("unseen_sums", fact, fact.held_out) for fact in sum_facts(held_out=True)]
    for fact in one_way_capitals():
        number = len(fact.phrases.exchanges)
        questions += [("reversed", fact, (fact.held_out + step) % number) for step in range(2)]
    return tuple(questions)


def _messages(turns: list[str]) -> list[Row]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]


def _in_any_order(items: Iterable[Any]) -> list[Any]:
    """The items, each once, mixed."""
    unique = {json.dumps(item, ensure_ascii=False): item for item in items}
    return [unique[key] for key in sorted(unique, key=lambda key: hashlib.sha256(key.encode()).digest())]


Files = Mapping[str, Callable[[], list[Row]]]
FILES = {
    "words": words,
    "pretrain": pretraining_rows,
    "sft": conversations,
    "preferences": preferences,
    "questions": questions,
    "choices": choices,
}
# In a folder of their own: the corpus keeps its name, by which a quickstart knows it, when a task is changed.
TASK_FILES = {"tasks": lambda: _in_any_order(tasks.training_rows()), "task_questions": tasks.questions}
PREFIX = "bundled:"  # before the name of a bundled file on the command line


def write(directory: Path, files: Files = FILES) -> None:
    """Write <name>.jsonl of each of the files, the same bytes every time; each file appears whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, make in files.items():
        part = directory / f"{name}.jsonl.{os.getpid()}.tmp"
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in make())
        part.write_bytes(lines.encode())
        os.replace(part, directory / f"{name}.jsonl")


def bundled_file(name: str, cache_dir: Path = CACHE_DIR) -> Path:
    """cache_dir/bundled-<hash>/<name>.jsonl, of a task tasks-<hash>/, written first if need be. ValueError if
    `cache_dir` is unusable."""
    of_tasks = name in TASK_FILES
    sources = (path for path in sorted(Path(__file__).parent.glob("*.py")) if of_tasks or path.stem != "tasks")
    version = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:12]
    folder = f"{'tasks' if of_tasks else 'bundled'}-{version}"
    make = partial(write, files=TASK_FILES if of_tasks else FILES)
    return cached_directory(Path(cache_dir), folder, make) / f"{name}.jsonl"


def with_bundled(names: str) -> str:
    """Names of files with commas between them, each bundled:<name> as the path of that bundled file.

    ValueError if there is no such bundled file.
    """
    return ",".join(_located(name) if name.strip().startswith(PREFIX) else name for name in names.split(","))


def _located(name: str) -> str:
    known, asked = [*FILES, *TASK_FILES], name.strip().removeprefix(PREFIX)
    if asked not in known:
        raise ValueError(f"{name.strip()}: no bundled file has this name; choose one of {', '.join(known)}")
    return str(bundled_file(asked))
