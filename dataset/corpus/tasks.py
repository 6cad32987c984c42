"""The tasks of the bundled set: answers of 20 to 80 tokens, each with exactly one right form, in English and Chinese.

Whoever writes many tokens of such an answer at once makes mistakes that stand out against their neighbours: a word of a
list twice, a carry that does not follow from its column. `training_rows` and `questions` are pure. A row is
{"question", "answer", "lang", "kind", "match": "whole"}; it is a conversation for training, too.

Held out is what a question is about: one content in HELD_OUT is asked about in evaluation alone, by all tasks and in
both languages. A list and its reverse are one content, and so are a sum and the subtractions that undo it.

To add a task, write a function (lang, Draw) -> Made and list it in TASKS with the ways of asking for it.
"""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import count
from typing import Any, NamedTuple, TypeVar

from dataset.corpus import tables
from dataset.corpus.facts import place_of

Item = TypeVar("Item")
Row = dict[str, Any]
ROWS, QUESTIONS = 600, 30  # of each task in each language
HELD_OUT = 20  # one content in so many
NOUNS = tables.WORDS[: [english for english, _ in tables.WORDS].index("hello")]  # greetings left out
PEOPLE = [(en[0], zh[0]) for en, zh in zip(tables.PEOPLE_EN, tables.PEOPLE_ZH, strict=True)]
SUBJECTS = [pair for pair in NOUNS if pair[0] in tables.words("doctor teacher student mother father dog cat horse")]
DEEDS = [("found", "捡到了"), ("saw", "看见了"), ("bought", "买了")]
MAX_LETTERS = 36  # of the words that are spelled
MAX_SWAPS = 3
CLAUSES = 3


class Draw:
    """Choices that depend on the key alone, each on its number, too."""

    def __init__(self, *key: object):
        self.key, self.made = key, 0

    def below(self, number: int) -> int:
        self.made += 1
        return place_of(number, *self.key, self.made)

    def between(self, low: int, high: int) -> int:
        """A number from `low` to `high`, both included."""
        return low + self.below(high - low + 1)

    def several(self, options: Sequence[Item], number: int) -> list[Item]:
        """So many different options."""
        left = list(options)
        return [left.pop(self.below(len(left))) for _ in range(number)]


class Made(NamedTuple):
    """One draw of a task: what it is about, the same in both languages, and the fields of question and answer."""

    content: tuple[object, ...]
    fields: dict[str, object]


class Task(NamedTuple):
    make: Callable[[str, Draw], Made]
    en: tuple[str, ...]  # ways of asking
    zh: tuple[str, ...]


def training_rows() -> list[Row]:
    return [row for kind in TASKS for lang in ("en", "zh") for row in _rows(kind, lang)[0]]


def questions() -> list[Row]:
    return [row for kind in TASKS for lang in ("en", "zh") for row in _rows(kind, lang)[1]]


@cache
def _rows(kind: str, lang: str) -> tuple[list[Row], list[Row]]:
    """The rows to learn, and those for evaluation."""
    taught: dict[str, Row] = {}
    asked: dict[str, Row] = {}
    drawn = (Draw("task", kind, lang, number) for number in count())
    while len(taught) < ROWS or len(asked) < QUESTIONS:
        draw = next(drawn)
        made = TASKS[kind].make(lang, draw)
        rows, wanted = (asked, QUESTIONS) if is_held_out(made.content) else (taught, ROWS)
        if len(rows) < wanted:
            question = draw.several(getattr(TASKS[kind], lang), 1)[0].format(**made.fields)
            answer = made.fields["answer"]
            rows[question] = {"question": question, "answer": answer, "lang": lang, "kind": kind, "match": "whole"}
    return list(taught.values()), list(asked.values())


def is_held_out(content: tuple[object, ...]) -> bool:
    return place_of(HELD_OUT, "held out", content) == 0


def _listed(lang: str, items: Sequence[object]) -> str:
    return (", " if lang == "en" else "，").join(map(str, items))


def _said(lang: str, items: Sequence[object]) -> str:
    return _listed(lang, items) + ("." if lang == "en" else "。")


def _in(lang: str, pairs: Sequence[tuple[str, ...]]) -> list[str]:
    """One language's words of (English, Chinese)."""
    return [pair[lang == "zh"] for pair in pairs]


# -- numbers -----------------------------------------------------------------------------------------------------------


def _count(lang: str, draw: Draw) -> Made:
    """Numbers of two digits, upwards or downwards."""
    step = draw.between(1, 9)
    last = draw.between(7, min(18, 89 // step))  # place of the last number
    first = draw.between(10, 99 - step * last)
    numbers = [first + step * place for place in range(last + 1)]
    content = first, numbers[-1], step
    if draw.below(2):
        numbers.reverse()
    return Made(content, {"a": numbers[0], "b": numbers[-1], "step": step, "answer": _said(lang, numbers)})


def _sort_numbers(lang: str, draw: Draw) -> Made:
    numbers = draw.several(range(10, 100), draw.between(8, 13))
    answer = _said(lang, sorted(numbers))
    return Made(tuple(sorted(numbers)), {"items": _listed(lang, numbers), "answer": answer})


def _add(lang: str, draw: Draw) -> Made:
    """Column by column from the right, with each carry, 0 included."""
    a, b = draw.between(100, 999), draw.between(100, 999)
    steps, carry = [], 0
    for place, (x, y) in enumerate(zip(reversed(str(a)), reversed(str(b)), strict=True)):
        column = int(x) + int(y) + carry
        steps.append(f"{x}+{y}{f'+{carry}' if place else ''}={column}")
        carry = column // 10
        steps.append(f"carry {carry}" if lang == "en" else f"进{carry}")
    answer = _said(lang, [*steps, f"{a}+{b}={a + b}"])
    return Made((min(a, b), max(a, b)), {"a": a, "b": b, "answer": answer})


def _subtract(lang: str, draw: Draw) -> Made:
    """Column by column from the right, with each ten that is borrowed for it, 0 included."""
    b, a = sorted(draw.several(range(100, 1000), 2))
    steps, borrowed = [], 0
    for place, (x, y) in enumerate(zip(reversed(str(a)), reversed(str(b)), strict=True)):
        before, borrowed = borrowed, int(int(x) - int(y) - borrowed < 0)
        x = int(x) + 10 * borrowed
        steps.append(f"{x}-{y}{f'-{before}' if place else ''}={x - int(y) - before}")
        steps.append(f"borrow {borrowed}" if lang == "en" else f"借{borrowed}")
    answer = _said(lang, [*steps, f"{a}-{b}={a - b}"])
    return Made((min(b, a - b), max(b, a - b)), {"a": a, "b": b, "answer": answer})


# -- lists of words ----------------------------------------------------------------------------------------------------


def _reverse(lang: str, draw: Draw) -> Made:
    pairs = draw.several(NOUNS, draw.between(10, 18))
    names = _in(lang, pairs)
    content = tuple(min(pairs, pairs[::-1]))
    return Made(content, {"items": _listed(lang, names), "answer": _said(lang, names[::-1])})


def _copy(lang: str, draw: Draw) -> Made:
    """A list with one word of it replaced."""
    *pairs, new = draw.several(NOUNS, draw.between(11, 19))
    place = draw.below(len(pairs))
    names, other = _in(lang, pairs), new[lang == "zh"]
    answer = _said(lang, [*names[:place], other, *names[place + 1 :]])
    return Made(tuple(pairs), {"items": _listed(lang, names), "old": names[place], "new": other, "answer": answer})


def _sort_words(lang: str, draw: Draw) -> Made:
    """English words in the order of the alphabet, in both languages: Chinese ones have no such order."""
    names = _in("en", draw.several(NOUNS, draw.between(10, 18)))
    return Made(tuple(sorted(names)), {"items": _listed(lang, names), "answer": _said(lang, sorted(names))})


def _spell(lang: str, draw: Draw) -> Made:
    """English words letter by letter; in Chinese their Chinese names are given."""
    pairs = draw.several(NOUNS, draw.between(4, 7))
    while sum(len(english) for english, _ in pairs) > MAX_LETTERS:
        pairs.pop()
    answer = _said(lang, ["-".join(english) for english, _ in pairs])
    return Made(tuple(sorted(pairs)), {"items": _listed(lang, _in(lang, pairs)), "answer": answer})


# -- sentences ---------------------------------------------------------------------------------------------------------


def _who_has(lang: str, draw: Draw) -> Made:
    """Four people, a thing each, and exchanges of two."""
    people, things = draw.several(PEOPLE, 4), draw.several(tables.THINGS, 4)
    swaps: list[list[int]] = []
    for _ in range(draw.between(1, MAX_SWAPS)):
        pair = sorted(draw.several(range(4), 2))
        if pair not in swaps[-1:]:  # which would undo it
            swaps.append(pair)
    names, has = _in(lang, people), "{} has {}" if lang == "en" else "{}有{}"
    now, exchange = ("{} now has {}", "{} and {} swap") if lang == "en" else ("{}现在有{}", "{}和{}交换")
    told = [has.format(*pair) for pair in zip(names, _in(lang, things), strict=True)]
    told += [exchange.format(names[x], names[y]) for x, y in swaps]
    content = tuple(people), tuple(things), tuple(map(tuple, swaps))
    for x, y in swaps:
        things[x], things[y] = things[y], things[x]
    answer = [now.format(*pair) for pair in zip(names, _in(lang, things), strict=True)]
    end = ". " if lang == "en" else "。"
    return Made(content, {"story": end.join(told) + end.strip(), "answer": end.join(answer) + end.strip()})


def _translate(lang: str, draw: Draw) -> Made:
    """Clauses of two subjects, a deed, a thing and a place, into the other language."""
    clauses = []
    for subjects, thing, place in zip(
        [draw.several(SUBJECTS, 2) for _ in range(CLAUSES)],
        draw.several(tables.THINGS, CLAUSES),
        draw.several(tables.PLACES, CLAUSES),
        strict=True,
    ):
        clauses.append((*subjects, draw.several(DEEDS, 1)[0], thing, (place[1], place[3])))
    en = [f"the {x[0]} and the {y[0]} {deed[0]} {thing[0]} {place[0]}" for x, y, deed, thing, place in clauses]
    zh = [f"{x[1]}和{y[1]}在{place[1]}{deed[1]}{thing[1]}" for x, y, deed, thing, place in clauses]
    texts = _said("en", en).capitalize(), _said("zh", zh)
    return Made(tuple(sorted(clauses)), {"text": texts[lang == "zh"], "answer": texts[lang == "en"]})


TASKS = {
    "count": Task(
        _count,
        ("Count from {a} to {b} in steps of {step}.", "Start at {a} and count to {b}, {step} at a time."),
        ("从{a}数到{b}，每次差{step}。", "请从{a}开始，每{step}个一数，数到{b}。"),
    ),
    "sort_numbers": Task(
        _sort_numbers,
        ("Put these numbers in order, from small to big: {items}.", "Say these numbers from small to big: {items}."),
        ("把这些数从小到大说一说：{items}。", "这些数从小到大怎么排？{items}。"),
    ),
    "add": Task(
        _add,
        ("What is {a}+{b}, step by step?", "Please add {a} and {b}, step by step."),
        ("{a}+{b}等于多少？一步一步地算。", "请一步一步地算：{a}加{b}。"),
    ),
    "subtract": Task(
        _subtract,
        ("What is {a}-{b}, step by step?", "Please take {b} from {a}, step by step."),
        ("{a}-{b}等于多少？一步一步地算。", "请一步一步地算：{a}减{b}。"),
    ),
    "reverse": Task(
        _reverse,
        ("Say these words from the last to the first: {items}.", "Turn this list around: {items}."),
        ("从后往前说这些词：{items}。", "请把这些词反过来说：{items}。"),
    ),
    "copy": Task(
        _copy,
        ("Say this list, but with {new} for {old}: {items}.", "Put {new} where {old} is: {items}."),
        ("说一说这些词，但是把{old}换成{new}：{items}。", "请把{old}换成{new}：{items}。"),
    ),
    "sort_words": Task(
        _sort_words,
        ("Put these words in the order of the alphabet: {items}.", "Say these words from A to Z: {items}."),
        ("把这些英文词从A到Z说一说：{items}。", "请从A到Z说这些英文词：{items}。"),
    ),
    "spell": Task(
        _spell,
        ("Spell these words: {items}.", "How do you spell these words? {items}."),
        ("这些词的英文怎么写？{items}。", "请一个一个写出英文：{items}。"),
    ),
    "who_has": Task(
        _who_has,
        ("{story} Who has what now?", "{story} What does each of them have?"),
        ("{story}现在谁有什么？", "{story}他们现在有什么？"),
    ),
    "translate": Task(
        _translate,
        ("Say this in Chinese: {text}", "What is this in Chinese? {text}"),
        ("用英文怎么说？{text}", "请用英文说：{text}"),
    ),
}
