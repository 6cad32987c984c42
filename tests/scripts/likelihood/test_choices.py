"""scripts.eval.likelihood on multiple choice: which choice is the likeliest, and what is no question."""

import math
from dataclasses import replace

import pytest

from dataset.rows.choice_formats import Question, question_of, read_questions
from dataset.tokenizer import encode, encode_chat
from scripts.engine.likelihood.choices import Accuracy, _windows_of, evaluate_choices
from scripts.engine.likelihood.documents import response_likelihood
from scripts.engine.prompts import Prompt
from scripts.eval import likelihood
from tests.scripts.conftest import sentences
from tests.scripts.likelihood.conftest import QUESTIONS, cost, turns
from tests.scripts.models import ready

KINDS = ["causal", "full"]


def in_template(text: str) -> Prompt:
    return Prompt(turns(text))


def continuations(row: dict) -> tuple[str, list[str]]:
    """By hand, for QUESTIONS: a blank before an English word after an English one, none beside Chinese."""
    joined = {
        "the cat sees": [" the river.", " my old friend", "那条河"],
        "一只小猫": ["看见了", "喜欢老朋友"],
        "my old friend ": [" likes", " follows", " remembers the cat"],
    }
    return row["question"].rstrip(), joined[row["question"]]


@pytest.mark.parametrize("wrap", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "block 3"])
def test_the_likeliest_choice_is_that_of_an_independent_loop(kind, wrap, tokenizer, file):
    """One choice at a time: for a causal model by the chain rule, for diffusion by the score of one response."""
    loaded, right, right_by_byte = ready(tokenizer, kind), [], []
    for row, answer in zip(QUESTIONS, (1, 0, 1), strict=True):
        prompt, parts = (row["question"], row["choices"]) if wrap else continuations(row)
        given = (
            encode_chat(tokenizer, turns(prompt), True)
            if wrap
            else [tokenizer.bos_token_id, *encode(tokenizer, prompt)]
        )
        if kind == "causal":
            nats = [cost(loaded.model, given + encode(tokenizer, part), len(given)) for part in parts]
        else:
            scores = [response_likelihood(loaded, Prompt(turns(prompt) if wrap else prompt), part, 3) for part in parts]
            nats = [-score["log_likelihood"] for score in scores]
        rates = [n / len(choice.encode()) for n, choice in zip(nats, row["choices"], strict=True)]
        right.append(nats.index(min(nats)) == answer)
        right_by_byte.append(rates.index(min(rates)) == answer)
    for size in (1, 4, 100):
        found, too_long = evaluate_choices(
            loaded, file(QUESTIONS, eval_batch_size=size), in_template if wrap else Prompt
        )
        assert too_long == 0 and found["all"].acc == sum(right) / 3 and found["all"].acc_norm == sum(right_by_byte) / 3
        assert found["all"].chance == pytest.approx((1 / 3 + 1 / 2 + 1 / 3) / 3)


@pytest.mark.parametrize(
    "question, choice, given, scored",
    [
        ("the cat", "sees", "the cat", " sees"),
        ("the cat ", "sees", "the cat", " sees"),
        ("the cat\n", "sees", "the cat", "\nsees"),
        ("the cat", " sees", "the cat", " sees"),
        ("the cat.", "看见了", "the cat.", "看见了"),
        ("一只小猫：", "the cat", "一只小猫：", "the cat"),
        ("", "the cat", "", "the cat"),
    ],
)
def test_the_blank_between_question_and_choice_belongs_to_the_choice(question, choice, given, scored, tokenizer):
    row = Question(question, [choice], 0, "other")
    (plain,), (chat,) = (_windows_of(tokenizer, row, 5, ask) for ask in (Prompt, in_template))
    condition = [tokenizer.bos_token_id, *encode(tokenizer, given)]
    assert (plain.ids, plain.begin, plain.fill) == (condition + encode(tokenizer, scored), len(condition), 0)
    assert chat.ids == encode_chat(tokenizer, turns(question), True) + encode(tokenizer, choice)


def test_every_question_is_right_if_the_likeliest_choice_is_the_answer(tokenizer, file):
    """And none if it is another: the outcome follows the answers, question by question."""
    loaded = ready(tokenizer, "causal")
    choices = ["the cat", "the river", "a small dog"]
    rows = [{"question": text, "choices": choices[i % 3 :] + choices[: i % 3]} for i, text in enumerate(sentences(12))]
    for row in rows:
        given = [tokenizer.bos_token_id, *encode(tokenizer, row["question"])]
        nats = [cost(loaded.model, given + encode(tokenizer, " " + choice), len(given)) for choice in row["choices"]]
        row["answer"] = nats.index(min(nats))
    assert len({row["answer"] for row in rows}) > 1
    assert evaluate_choices(loaded, file(rows), Prompt)[0]["all"].acc == 1
    for row in rows:
        row["answer"] = (row["answer"] + 1) % 3
    assert evaluate_choices(loaded, file(rows), Prompt)[0]["all"].acc == 0


def test_a_model_that_knows_nothing_takes_the_fewest_tokens_or_the_fewest_per_byte(tokenizer, file):
    short, dense = "z", "the cat sees the river."  # one token of one byte; few tokens of many bytes
    assert len(encode(tokenizer, " " + short)) <= 2 < len(encode(tokenizer, dense))
    loaded = ready(tokenizer, "causal", uniform=True)
    for answer, expected in ((short, (1, 0)), (dense, (0, 1))):
        rows = [{"question": "a small dog", "choices": [short, dense], "answer": answer}]
        found = evaluate_choices(loaded, file(rows), Prompt)[0]["all"]
        assert (found.acc, found.acc_norm) == expected


@pytest.mark.parametrize("answer, place", [(0, 0), (2, 2), ("A", 0), ("D", 3), ("two", 1), ("C", 2)])
def test_an_answer_is_an_index_a_letter_or_a_text_or_letter_and_text_of_one_choice(answer, place):
    choices = ["one", "two", "C", "four"]
    assert question_of({"question": "?", "choices": choices, "answer": answer}).answer == place


def test_questions_are_grouped_by_their_stated_language_else_by_their_letters(workspace, file):
    rows = [QUESTIONS[0] | {"lang": "en"}, QUESTIONS[0], QUESTIONS[1], QUESTIONS[1] | {"lang": None}]
    assert [q.language for _, q in read_questions(file(rows).eval_data)] == ["en", "other", "zh", "zh"]


def test_the_errors_of_an_accuracy_are_binomial_and_wilsons():
    """The intervals of 0 and 5 of 10 are textbook values (Wilson 1927; Brown, Cai, DasGupta 2001)."""
    found = Accuracy.of("exact", [(4, i < 5, False) for i in range(10)])
    assert found.acc_interval == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert found.acc_norm_interval == pytest.approx((0, 0.2775), abs=1e-4)
    assert (found.acc_error, found.acc_norm_error) == (pytest.approx(math.sqrt(0.025)), 0)


def test_questions_longer_than_the_context_are_left_out_whole_and_counted(tokenizer, file):
    loaded = ready(tokenizer, "causal")
    lengths = []
    for row in QUESTIONS:
        prompt, parts = continuations(row)
        lengths.append(1 + len(encode(tokenizer, prompt)) + max(len(encode(tokenizer, part)) for part in parts))
    for limit in range(min(lengths), max(lengths) + 1):
        found, too_long = evaluate_choices(replace(loaded, max_length=limit), file(QUESTIONS), Prompt)
        assert too_long == sum(length > limit for length in lengths) and found["all"].questions == 3 - too_long
    with pytest.raises(ValueError, match="all 3 questions are longer than --max-seq-len 3"):
        evaluate_choices(replace(loaded, max_length=3), file(QUESTIONS), Prompt)


BAD_QUESTIONS = {
    "expected a question with its choices": {"choices": ["a", "b"], "answer": 0},
    'field "question" is a number': {"question": 5, "choices": ["a", "b"], "answer": 0},
    "fields present: question, answer": {"question": "?", "answer": 0},
    'field "choices" is a string, expected an array': {"question": "?", "choices": "ab", "answer": 0},
    "expected at least 2 choices, found 0": {"question": "?", "choices": [], "answer": 0},
    "choice 2 is empty": {"question": "?", "choices": ["a", " "], "answer": 0},
    "choice 1 is a number": {"question": "?", "choices": [1, "b"], "answer": 0},
    "two choices are the same": {"question": "?", "choices": ["a", "a"], "answer": 0},
    'field "answer" is missing': {"question": "?", "choices": ["a", "b"]},
    "answer 3 is out of range, expected an index from 0 to 1": {"question": "?", "choices": ["a", "b"], "answer": 3},
    "answer -1 is out of range": {"question": "?", "choices": ["a", "b"], "answer": -1},
    'answer "C" is none of the choices': {"question": "?", "choices": ["a", "b"], "answer": "C"},
    "answer is a boolean": {"question": "?", "choices": ["a", "b"], "answer": True},
    "is one choice's letter and another's text": {"question": "?", "choices": ["B", "A"], "answer": "A"},
}


@pytest.mark.parametrize("words", BAD_QUESTIONS)
def test_a_bad_question_is_named_by_file_and_row(words, saved, file, refused):
    data = file([QUESTIONS[0], BAD_QUESTIONS[words]])
    refused(likelihood, saved("full", "--eval-data", data.eval_data), "rows.jsonl, row 2: ", words)


def test_rows_of_a_kind_that_has_no_likelihood_are_named_by_their_fields(saved, file, refused):
    data = file([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    refused(likelihood, saved("full", "--eval-data", data.eval_data), "fields prompt, chosen, rejected are of no known")
