"""The bundled tasks, solved once more from the text of their questions."""

import hashlib
import re
from collections import Counter

import pytest

from dataset.corpus import bundled, tables, tasks
from dataset.rows.formats import messages_of
from dataset.tokenizer import encode_batch, train_bpe
from scripts.engine.statistics import is_correct

ENGLISH = {zh: en for en, zh in tables.WORDS}
PERSON = {zh[0]: en[0] for en, zh in zip(tables.PEOPLE_EN, tables.PEOPLE_ZH, strict=True)}
THING = {zh: en for en, zh in tables.THINGS}
PLACE = {zh: en for _, en, _, zh in tables.PLACES}
DEED = {"捡到了": "found", "看见了": "saw", "买了": "bought"}


@pytest.fixture(scope="module")
def made():
    return {name: make() for name, make in bundled.TASK_FILES.items()}


@pytest.fixture(scope="module")
def rows(made):
    return made["tasks"] + made["task_questions"]


def said(text: str) -> list[str]:
    """The parts of a list, without the words that come before it."""
    return re.split("[,，] ?", re.split(r"[:：?？] ?", text.rstrip(".。"))[-1])


def numbers(text: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", text)]


def in_english(words: list[str]) -> list[str]:
    return [ENGLISH.get(word, word) for word in words]


def clauses(text: str) -> list[tuple[str, ...]]:
    """Sentences of a translation, in English."""
    english = re.findall(r"the (\w+) and the (\w+) (found|saw|bought) (.+?) ((?:in|by|at) the \w+)", text.lower())
    chinese = re.findall(r"(\w+?)和(\w+?)在(\w+?)(捡到了|看见了|买了)(\w+)", text)
    return english + [(*in_english([a, b]), DEED[deed], THING[thing], PLACE[at]) for a, b, at, deed, thing in chinese]


def story(text: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Who has what at first, and who exchanges it, in English."""
    owned = re.findall(r"([A-Z]\w+) has (.+?)\.|(小\w|阿\w)有(.+?)。", text)
    pairs = re.findall(r"(\w+) and (\w+) swap|(小\w|阿\w)和(\w+?)交换", text)
    return (
        [(PERSON.get(a + c, a + c), THING.get(b + d, b + d)) for a, b, c, d in owned],
        [(PERSON.get(a + c, a + c), PERSON.get(b + d, b + d)) for a, b, c, d in pairs],
    )


def content(row: dict) -> object:
    """What a question is about, in neither language and in no direction, read from its text."""
    kind, found, words = row["kind"], numbers(row["question"]), in_english(said(row["question"]))
    if kind in ("add", "subtract"):
        a, b = sorted(found)
        return "sum", *sorted((a, b) if kind == "add" else (b - a, a))
    if kind in ("count", "sort_numbers"):
        return kind, *sorted(found)
    if kind == "who_has":
        return str(story(row["question"]))
    if kind == "translate":
        return tuple(sorted(clauses(row["question"])))
    return kind, *(min(words, words[::-1]) if kind == "reverse" else words if kind == "copy" else sorted(words))


def listed(row: dict, items: list) -> str:
    return f"{', '.join(map(str, items))}." if row["lang"] == "en" else f"{'，'.join(map(str, items))}。"


def columns(row: dict, sign: int) -> str:
    """The written sum or difference, from the numbers themselves and not from their digits."""
    a, b = sorted(numbers(row["question"]), reverse=True) if sign < 0 else numbers(row["question"])
    word, steps, carry = ({"en": ("borrow ", "carry "), "zh": ("借", "进")}[row["lang"]][sign > 0], [], 0)
    for power in (1, 10, 100):
        before, x, y = carry, a // power % 10, b // power % 10
        carry = int(x + y + before > 9 if sign > 0 else x < y + before)
        x += 10 * carry if sign < 0 else 0
        mark = "+" if sign > 0 else "-"
        terms = [x, y] if power == 1 else [x, y, before]
        steps += [f"{mark.join(map(str, terms))}={x + sign * (y + before)}", f"{word}{carry}"]
    return listed(row, [*steps, f"{a}{mark}{b}={a + sign * b}"])


def copied(row: dict) -> str:
    english = re.search(r"(?:with|Put) (\w+) (?:for|where) (\w+)", row["question"])
    new, old = english.groups() if english else re.search(r"把(\w+)换成(\w+)", row["question"]).groups()[::-1]
    words = said(row["question"])
    assert words.count(old) == 1 and new not in words
    return listed(row, [new if word == old else word for word in words])


def counted(row: dict) -> str:
    step = min(numbers(row["question"]))
    a, b = (number for number in numbers(row["question"]) if number != step)
    return listed(row, [*range(a, b + 1, step)] if a < b else [*range(a, b - 1, -step)])


def told(row: dict) -> str:
    owned, swaps = story(row["question"])
    has = dict(owned)
    assert len(has) == len({*has.values()}) == 4 and swaps
    for a, b in swaps:
        has[a], has[b] = has[b], has[a]
    if row["lang"] == "en":
        return " ".join(f"{name} now has {thing}." for name, thing in has.items())
    names, things = ({en: zh for zh, en in words.items()} for words in (PERSON, THING))
    return "".join(f"{names[name]}现在有{things[thing]}。" for name, thing in has.items())


SOLVED = {
    "count": counted,
    "sort_numbers": lambda row: listed(row, sorted(numbers(row["question"]))),
    "add": lambda row: columns(row, 1),
    "subtract": lambda row: columns(row, -1),
    "reverse": lambda row: listed(row, [*reversed(said(row["question"]))]),
    "copy": copied,
    "sort_words": lambda row: listed(row, sorted(said(row["question"]))),
    "spell": lambda row: listed(row, ["-".join(word) for word in in_english(said(row["question"]))]),
    "who_has": told,
}


def test_every_answer_is_right(rows):
    for row in rows:
        if row["kind"] == "translate":
            assert len(clauses(row["answer"])) == tasks.CLAUSES and clauses(row["answer"]) == clauses(row["question"])
            assert row["answer"].isascii() == (row["lang"] == "zh")
        else:
            assert SOLVED[row["kind"]](row) == row["answer"], row


def test_an_answer_has_one_form(rows):
    """The same question never has two answers, and nothing but the answer is right."""
    assert len({row["question"] for row in rows}) == len(rows)
    for row in rows[::50]:
        answer = row["answer"]
        asked = answer, row["question"], row["match"] == "whole"
        assert is_correct(f" {answer}\n", *asked) and is_correct(answer.replace(" ", "\n"), *asked)
        for wrong in (f"{answer} {answer}", answer[:-1], answer[1:], answer.replace(answer[5], "?", 1), ""):
            assert not is_correct(wrong, *asked)


def test_nothing_that_is_asked_in_evaluation_is_learnt(made):
    learnt, asked = ({content(row) for row in made[name]} for name in ("tasks", "task_questions"))
    assert len(learnt) > 11_000 and len(asked) > 500
    assert not learnt & asked


def test_every_task_has_as_many_rows_in_both_languages(made):
    for name, number in (("tasks", tasks.ROWS), ("task_questions", tasks.QUESTIONS)):
        counts = Counter((row["kind"], row["lang"]) for row in made[name])
        assert counts == {(kind, lang): number for kind in tasks.TASKS for lang in ("en", "zh")}
    assert len(made["tasks"]) == 12_000 and len(made["task_questions"]) == 600


def test_answers_have_20_to_80_tokens_by_the_bundled_tokenizer_and_the_one_of_the_repository(rows, shipped):
    own = train_bpe((row["text"] for row in bundled.words()), 4096)
    for some in (own, shipped):
        lengths = [len(ids) for ids in encode_batch(some, [row["answer"] for row in rows[::3]])]
        assert min(lengths) >= 20 and max(lengths) <= 80


def test_rows_are_conversations_for_training(rows):
    for row in rows[::100]:
        assert [message["content"] for message in messages_of(row)] == [row["question"], row["answer"]]


def test_the_files_are_the_same_bytes_everywhere_and_leave_the_corpus_alone(made, tmp_path):
    paths = [bundled.bundled_file(name, tmp_path) for name in bundled.TASK_FILES]
    assert [path.name for path in sorted(tmp_path.iterdir()) if path.is_dir()] == [paths[0].parent.name]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    assert digest[:16] == "c66faf68e6411f96"
