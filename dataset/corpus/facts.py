"""The facts of the bundled corpus, with every way of stating and asking them, and its stories."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import NamedTuple, TypeVar

from dataset.corpus import tables
from dataset.corpus.phrases import Phrases
from dataset.corpus.phrases_en import EN
from dataset.corpus.phrases_zh import ZH
from dataset.corpus.stories import IDENTITY, READING, STORIES, SUM_STORIES

Item = TypeVar("Item")
PHRASES = {"en": EN, "zh": ZH}
LARGEST = 20  # of sums, of what is subtracted from, of counting
STORIES_PER_PLOT, READINGS_PER_TEXT, SUM_STORIES_PER_SUM = 400, 800, 3


def place_of(count: int, *key: object) -> int:
    """A number below `count` that depends on the key alone, evenly spread."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") % count


def pick(options: Sequence[Item], *key: object) -> Item:
    return options[place_of(len(options), *key)]


def sentence(pattern: str, lang: str, **fields: str) -> str:
    """The pattern filled in, an English one beginning with a capital."""
    text = pattern.format(**fields)
    keeps_case = lang == "zh" or text.startswith("nano-llada")
    return text if keeps_case else text[0].upper() + text[1:]


class Fact(NamedTuple):
    """One fact in one language. `key` is shared by the two languages; `slot` names the field that is asked for."""

    kind: str
    lang: str
    key: tuple[str, ...]
    phrases: Phrases
    slot: str
    fields: dict[str, str]

    @property
    def answer(self) -> str:
        return self.fields[self.slot]

    @property
    def statements(self) -> list[str]:
        return [sentence(pattern, self.lang, **self.fields) for pattern in self.phrases.statements]

    @property
    def exchanges(self) -> list[tuple[str, str]]:
        """(question, reply)"""
        return [(self.question(place), self.reply(place)) for place in range(len(self.phrases.exchanges))]

    @property
    def held_out(self) -> int:
        """Which of the exchanges is kept for evaluation; -1, none, where no other fact is asked for so."""
        return (
            -1 if self.kind == "identity" else place_of(len(self.phrases.exchanges), "phrasing", self.lang, *self.key)
        )

    @property
    def seen(self) -> list[tuple[str, str]]:
        """The exchanges to learn from."""
        return [pair for place, pair in enumerate(self.exchanges) if place != self.held_out]

    def question(self, place: int) -> str:
        return sentence(self.phrases.exchanges[place][0], self.lang, **self.fields)

    def reply(self, place: int, answer: str | None = None) -> str:
        """The reply to an exchange's question, with another answer if one is given."""
        fields = self.fields if answer is None else self.fields | {self.slot: answer}
        return sentence(self.phrases.exchanges[place][1], self.lang, **_with_article(self.lang, fields))


def _with_article(lang: str, fields: dict[str, str]) -> dict[str, str]:
    if lang == "zh" or "animal" not in fields:
        return fields
    animal = fields["animal"]
    return fields | {"one": ("an " if animal[0] in "aeiou" else "a ") + animal}


def _both(kind: str, answer: str, names: Sequence[str], english: Sequence[str], chinese: Sequence[str]) -> list[Fact]:
    """The fact in both languages, of the fields `names`; `answer` names the one that is asked for."""
    return [
        Fact(
            kind,
            lang,
            (kind, *english),
            PHRASES[lang][kind],
            answer,
            _with_article(lang, dict(zip(names, values, strict=True))),
        )
        for lang, values in (("en", english), ("zh", chinese))
    ]


@cache
def facts() -> tuple[Fact, ...]:
    """Everything that the corpus teaches, in both languages."""
    return (*_geography(), *_nature(), *_order(), *_language(), *_arithmetic(), *_identity())


def one_way_capitals() -> list[Fact]:
    """What was never said of tables.CAPITALS_ONE_WAY: the capital, given the country."""
    return [
        fact
        for country, city, guo, cheng in tables.CAPITALS_ONE_WAY
        for fact in _both("capital", "city", ("country", "city"), (country, city), (guo, cheng))
    ]


def _geography() -> Iterator[Fact]:
    for country, city, guo, cheng in tables.CAPITALS:
        yield from _both("capital", "city", ("country", "city"), (country, city), (guo, cheng))
    for country, city, guo, cheng in tables.CAPITALS + tables.CAPITALS_ONE_WAY:
        yield from _both("country", "country", ("country", "city"), (country, city), (guo, cheng))


def _nature() -> Iterator[Fact]:
    kinds = (
        ("colour", "colour", ("thing", "colour"), tables.COLOURS),
        ("sound", "sound", ("animal", "sound"), tables.SOUNDS),
        ("animal", "animal", ("animal", "sound"), tables.SOUNDS),
        ("legs", "legs", ("animal", "legs"), tables.LEGS),
        ("home", "home", ("animal", "home"), tables.HOMES),
        ("young", "young", ("animal", "young"), tables.YOUNG),
        ("grown", "animal", ("animal", "young"), tables.YOUNG),
    )
    for kind, answer, names, table in kinds:
        for row in table:
            yield from _both(kind, answer, names, row[:2], row[2:])


def _order() -> Iterator[Fact]:
    """The calendar and counting."""
    numbers = [(str(n), str(n)) for n in range(LARGEST + 11)]
    circles = (
        ("day", "星期几", [*tables.WEEKDAYS, tables.WEEKDAYS[0]]),
        ("month", "几月", [*tables.MONTHS, tables.MONTHS[0]]),
        ("season", "什么季节", [*tables.SEASONS, tables.SEASONS[0]]),
        ("number", "几", numbers),
    )
    names = ("before", "after", "unit")
    for unit, danwei, circle in circles:
        for (before, qian), (after, hou) in pairwise(circle):
            yield from _both("next", "after", names, (before, after, unit), (qian, hou, danwei))
            yield from _both("previous", "before", names, (before, after, unit), (qian, hou, danwei))
    for (month, yue), ordinal in zip(tables.MONTHS, tables.ORDINALS, strict=True):
        yield from _both("month", "month", ("month", "ordinal"), (month, ordinal), (yue, yue.removesuffix("月")))
    for row in tables.LENGTHS:
        yield from _both("length", "number", ("whole", "number", "parts"), row[:3], row[3:])


def _language() -> Iterator[Fact]:
    for word, other, ci, fan in tables.OPPOSITES:
        yield from _both("opposite", "other", ("word", "other"), (word, other), (ci, fan))
        yield from _both("opposite", "other", ("word", "other"), (other, word), (fan, ci))
    for pair in tables.WORDS:
        yield from _both("chinese", "chinese", ("english", "chinese"), pair, pair)
        yield from _both("english", "english", ("english", "chinese"), pair, pair)
    for number, (word, numeral) in enumerate(zip(tables.NUMBER_WORDS, tables.NUMERALS, strict=True)):
        yield from _both("numeral", "word", ("digits", "word"), (str(number), word), (str(number), numeral))


def _sums() -> list[tuple[int, int, int]]:
    """(a, b, a + b): all up to LARGEST, and those of two tens up to a hundred."""
    small = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1 - a)]
    tens = [(a, b) for a in range(10, 100, 10) for b in range(10, 100, 10) if LARGEST < a + b < 100]
    return [(a, b, a + b) for a, b in small + tens]


def _held_out_sums() -> frozenset[tuple[int, int]]:
    """A fifth of the sums of two numbers from 2 up to LARGEST, but not 2 + 2, which
    2 x 2 = 4 would tell; (smaller, larger)."""
    pairs = sorted({(a, b) for a, b, c in _sums() if 2 <= a <= b and c <= LARGEST} - {(2, 2)})
    return frozenset(sorted(pairs, key=lambda pair: place_of(2**32, "sum", pair))[: len(pairs) // 5])


HELD_OUT_SUMS = _held_out_sums()


def is_held_out(a: int, b: int) -> bool:
    return (min(a, b), max(a, b)) in HELD_OUT_SUMS


def sum_facts(held_out: bool) -> list[Fact]:
    """The sums that are held out, or all others, in both orders."""
    names = ("a", "b", "c")
    chosen = [tuple(map(str, abc)) for abc in _sums() if is_held_out(*abc[:2]) == held_out]
    return [fact for values in chosen for fact in _both("sum", "c", names, values, values)]


def _arithmetic() -> Iterator[Fact]:
    names = ("a", "b", "c")
    yield from sum_facts(held_out=False)
    for a, b, total in _sums():
        if not is_held_out(a, b) and total <= LARGEST:
            values = str(total), str(b), str(a)
            yield from _both("difference", "c", names, values, values)
    for a in range(2, 10):
        for b in range(2, 10):
            values = str(a), str(b), str(a * b)
            yield from _both("product", "c", names, values, values)


def _identity() -> Iterator[Fact]:
    for lang, subjects in IDENTITY.items():
        for subject, (answer, reply, questions) in subjects.items():
            phrases = Phrases((), tuple((question, reply) for question in questions))
            yield Fact("identity", lang, ("identity", subject), phrases, "answer", {"answer": answer})


def _cast(lang: str, *key: object) -> dict[str, str]:
    """Two people, a pet, a place and two things for a story."""
    people, column = (tables.PEOPLE_EN, 0) if lang == "en" else (tables.PEOPLE_ZH, 1)
    first = place_of(len(people), "first", *key)
    second = (first + 1 + place_of(len(people) - 1, "second", *key)) % len(people)
    thing = place_of(len(tables.THINGS), "thing", *key)
    other = (thing + 1 + place_of(len(tables.THINGS) - 1, "other", *key)) % len(tables.THINGS)
    place = pick(tables.PLACES, "place", *key)
    fields = {
        "name": people[first][0],
        "he": people[first][1],
        "He": people[first][1].capitalize(),
        "his": people[first][-1],
        "friend": people[second][0],
        "pet": pick(tables.PETS, "pet", *key)[column],
        "thing": tables.THINGS[thing][column],
        "other": tables.THINGS[other][column],
    }
    return fields | ({"to": place[0], "at": place[1]} if lang == "en" else {"place": place[2], "at": place[3]})


@cache
def stories(lang: str) -> tuple[tuple[str, str], ...]:
    """(name of the hero, story), no two stories alike."""
    heroes = {}
    for plot, pattern in enumerate(STORIES[lang]):
        for number in range(STORIES_PER_PLOT):
            cast = _cast(lang, "story", lang, plot, number)
            heroes[sentence(pattern, lang, **cast)] = cast["name"]
    return tuple((name, story) for story, name in heroes.items())


@cache
def reading(lang: str) -> tuple[Fact, ...]:
    """Questions whose answer stands in them; a part of them is for evaluation (see bundled.is_reading_test)."""
    questions = {}
    for text, exchange in enumerate(READING[lang]):
        phrases = Phrases((), (exchange,))
        for number in range(READINGS_PER_TEXT):
            cast = _cast(lang, "reading", lang, text, number)
            fact = Fact("reading", lang, ("reading", str(text), str(number)), phrases, "thing", cast)
            questions[fact.question(0)] = fact
    return tuple(questions.values())


@cache
def sum_stories(lang: str) -> tuple[str, ...]:
    """Sums that happen to someone; none that is held out."""
    texts = {}
    for a, b, c in _sums():
        if min(a, b) >= 2 and c <= LARGEST and not is_held_out(a, b):
            for number in range(SUM_STORIES_PER_SUM):
                key = "sum story", lang, a, b, number
                fruit, guo = pick(tables.FRUITS, "fruit", *key)
                fields = _cast(lang, *key) | {"fruit": fruit if lang == "en" else guo, "rest": guo[0]}
                texts[sentence(pick(SUM_STORIES[lang], *key), lang, a=a, b=b, c=c, **fields)] = None
    return tuple(texts)
