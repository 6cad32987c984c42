"""Questions of every format: one question in two formats is the same question, or it is refused by name; no text is
lost. And which kind a file is."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from dataset.pretrain import PretrainData, PretrainDataset
from dataset.reading.bad_rows import BadRows
from dataset.rows.choice_formats import ANSWER_FIELDS, CHOICE_FORMATS, LETTERS, question_of, read_questions
from dataset.rows.exercise_formats import EXERCISE_FORMATS, exercise_of, read_exercises
from dataset.rows.formats import TEXT_FIELDS, messages_of
from dataset.rows.kinds import kinds_of, kinds_of_rows, note_on_explanations, note_on_others, note_on_training
from dataset.rows.messages import EXPLANATIONS

LABELS = "1234"


def objects(choices: list[str]) -> list[dict]:
    return [{"label": LETTERS[place], "text": choice} for place, choice in enumerate(choices)]


def columns(names: list[str], choices: list[str]) -> dict:
    return dict(zip(names, choices, strict=False))


FORMS = {  # (question, choices, index of the answer) -> row
    "index": lambda q, c, a: {"question": q, "choices": c, "answer": a},
    "letter": lambda q, c, a: {"question": q, "choices": c, "answer": LETTERS[a]},
    "array of a letter": lambda q, c, a: {"question": q, "options": c, "answer": [LETTERS[a]]},
    "text": lambda q, c, a: {"question": q, "options": c, "answer": c[a]},
    "text and letter": lambda q, c, a: {
        "question": q,
        "options": columns(LETTERS, c),
        "answer": c[a],
        "answer_idx": LETTERS[a],
        "meta_info": "step 2 & 3",
    },
    "ARC": lambda q, c, a: {
        "id": "a b",
        "question": q,
        "choices": {"text": c, "label": [*LETTERS[: len(c)]]},
        "answerKey": LETTERS[a],
    },
    "ARC in digits": lambda q, c, a: {
        "question": q,
        "choices": {"text": c, "label": [*LABELS[: len(c)]]},
        "answerKey": LABELS[a],
    },
    "MMLU": lambda q, c, a: {"question": q, "choices": c, "answer": a, "subject": "abstract algebra"},
    "MMLU-Pro": lambda q, c, a: {
        "question": q,
        "options": c,
        "answer": LETTERS[a],
        "answer_index": a,
        "cot_content": "A: Let's think step by step.",
        "category": "b c",
    },
    "C-Eval": lambda q, c, a: {
        "id": 0,
        "question": q,
        **columns(LETTERS, c),
        "answer": LETTERS[a],
        "explanation": "因为 b",
    },
    "CMMLU": lambda q, c, a: {"": 0, "Question": q, **columns(LETTERS, c), "Answer": LETTERS[a]},
    "CSV": lambda q, c, a: {"question": q, **{name: "" for name in "CDE"}, **columns(LETTERS, c), "answer": LETTERS[a]},
    "JSON in a cell": lambda q, c, a: {
        "question": q,
        "choices": json.dumps({"text": c, "label": [*LETTERS[: len(c)]]}),
        "answer": LETTERS[a],
    },
    "MedMCQA": lambda q, c, a: {"question": q, **columns(["opa", "opb", "opc", "opd"], c), "cop": a, "exp": "b c"},
    "option_a": lambda q, c, a: {
        "question": q,
        **columns([f"option_{x}" for x in "abcd"], c),
        "answer": LETTERS[a].lower(),
    },
    "HellaSwag": lambda q, c, a: {"ctx": q, "endings": c, "label": str(a), "ind": 4, "ctx_a": q, "split_type": "a b"},
    "PIQA": lambda q, c, a: {"goal": q, **columns(["sol1", "sol2"], c), "label": a},
    "SocialIQA": lambda q, c, a: {"question": q, **columns(["answerA", "answerB", "answerC"], c), "label": str(a + 1)},
    "CosmosQA": lambda q, c, a: {"question": q, **columns([f"answer{n}" for n in range(4)], c), "label": a},
    "Belebele": lambda q, c, a: {
        "question": q,
        **columns([f"mc_answer{n}" for n in LABELS], c),
        "correct_answer_num": str(a + 1),
    },
    "Winogrande": lambda q, c, a: {"sentence": f"{q}_", **columns(["option1", "option2"], c), "answer": LABELS[a]},
    "CommonsenseQA": lambda q, c, a: {
        "id": 1,
        "question": {"stem": q, "choices": objects(c)},
        "answerKey": LETTERS[a],
    },
    "OpenBookQA": lambda q, c, a: {"question_stem": q, "choices": objects(c), "answerKey": LETTERS[a]},
    "nulls": lambda q, c, a: {
        "question": q,
        "choices": None,
        "options": {**columns(LETTERS, c), "F": None},
        "answer": None,
        "label": LETTERS[a],
        "messages": None,
        "text": None,
    },
}
TWO = ("PIQA", "Winogrande")  # formats of two choices
some_text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9).filter(str.strip)
searched = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("name", FORMS)
@searched
@given(some_text, st.lists(some_text, min_size=2, max_size=3, unique=True), st.integers(0, 2))
def test_every_form_is_the_same_question_byte_for_byte(name, question, choices, answer):
    choices = choices[:2] if name in TWO else choices
    assume(name != "Winogrande" or "_" not in question)
    assume(answer < len(choices))
    row = FORMS[name](question, choices, answer)
    try:
        found = question_of(row)
    except ValueError as error:  # a text that is a letter, too
        assert "is one choice's letter and another's text" in str(error) and {*choices} & {*LETTERS[:4], *LABELS}
    else:
        assert found[:3] == (question, choices, answer) and kinds_of(row) == ["choices"]


def test_there_is_a_form_for_every_entry_of_the_table_of_choices():
    rows = [make("q", ["b", "c"], 0) for make in FORMS.values()]
    rows = [{name: value for name, value in row.items() if value is not None} for row in rows]
    assert {next(name for name, form in CHOICE_FORMATS.items() if form.fits(row)) for row in rows} == {*CHOICE_FORMATS}


@pytest.mark.parametrize("name", FORMS)
def test_a_text_beside_choices_is_asked_or_named(name):
    own = FORMS[name]("q", ["b c", "d e"], 1)
    for field in {*TEXT_FIELDS, "note", "passage", "activity_label", "explanation"} - own.keys() - {*ANSWER_FIELDS}:
        try:
            found = question_of(own | {field: "ZEBRA 1"})
        except ValueError as error:
            assert f'"{field}"' in str(error) or field in ("label", "choices", "options"), (field, error)
        else:
            assert field in EXPLANATIONS or "ZEBRA 1" in found.content, field


def test_a_passage_stands_before_the_question_and_the_activity_before_the_beginning():
    row = {"article": "A cat sat.", "question": "Who sat?", "options": ["cat", "dog"], "answer": "A"}
    assert question_of(row).text == "A cat sat.\nWho sat?"
    row = {"activity_label": "Cooking", "ctx_a": "A man", "ctx_b": "he", "endings": ["eats", "sits"], "label": 1}
    assert question_of(row).text == "Cooking: A man he" and question_of({**row, "ctx": "A man he"}).text.endswith(
        "man he"
    )
    row = {"sentence": "The _ is big.", "option1": "cat", "option2": "dog", "answer": "2"}
    assert question_of(row)[:3] == ("The ", ["cat is big.", "dog is big."], 1)


def question(answer: object, count: int = 4, **more: object) -> dict:
    return {"question": "?", "choices": [f"a {place}" for place in range(count)], "answer": answer, **more}


REFUSED = {
    "two answers": (question(1, answer_idx="A"), "answer and answer_idx are two different answers"),
    "several right ones": (question(["A", "B"]), "answer is an array"),
    "no answer": (question(""), '"answer" is missing'),
    "out of range": (question(7), "answer 7 is out of range, expected an index from 0 to 3"),
    "digits where choices are numbers": (question("7") | {"choices": ["5", "6"]}, 'answer "7" is none of the choices'),
    "labels that do not fit": (question("A") | {"choices": {"text": ["a", "b"], "label": ["A"]}}, "the same length"),
    "a choice that is a picture": (question(0) | {"choices": ["a", {"image": "b"}]}, "choice 2 is an object"),
    "an empty column between others": (
        {"question": "?", "A": "1", "B": "", "C": "2", "answer": "A"},
        "choice 2 is empty",
    ),
    "no JSON": (question(0) | {"choices": "['a', 'b']"}, '"choices" is a string, but no JSON'),
    "system prompt": (question(0, system="Be brief."), '"system" carries text'),
    "no blank": ({"sentence": "a", "option1": "b", "option2": "c", "answer": "1"}, "needs one blank"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_asked_is_refused_by_name(name):
    row, words = REFUSED[name]
    with pytest.raises(ValueError) as refused:
        question_of(row)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def written(folder: Path, rows: list[dict]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "answers, counts_from_one",
    [
        ([1, 2, 3, 4], True),
        ([2, 1, 4, "1"], True),
        ([2] * 12, True),  # by chance in 3 of 100 files
        ([2] * 6, False),
        ([0, 1, 2, 3], False),
        ([0, 1, 2, 4], False),  # a bad row
        ([1, 2, 3, 9], False),
        (["A", "B", "C", "D"] * 9, False),
        (["a 1"] * 40, False),
    ],
)
def test_answers_that_count_from_one_are_a_fault_of_the_file(answers, counts_from_one, tmp_path):
    path = written(tmp_path, [question(answer) for answer in answers])
    bad = BadRows("skip")
    if counts_from_one:
        with pytest.raises(ValueError, match="rows.jsonl: the answers seem to count from 1"):
            list(read_questions(path, bad=bad))
    else:
        assert len(list(read_questions(path, bad=bad))) == len(answers) - bad.count
        assert bad.count == sum(answer in (4, 9) for answer in answers)


def test_labels_and_formats_that_count_from_one_are_right(tmp_path):
    rows = [
        FORMS[name]("?", ["b c", "d e"], 1) for name in ("ARC in digits", "Winogrande", "SocialIQA") for _ in range(40)
    ]
    assert {question.answer for _, question in read_questions(written(tmp_path, rows))} == {1}


# -- exercises ---------------------------------------------------------------------------------------------------------

EXERCISES = {  # (question, answer) -> row
    "plain": lambda q, a: {"question": q, "answer": a},
    "final": lambda q, a: {"question": q, "answer": f"So {a}", "final": a},
    "GSM8K": lambda q, a: {"question": q, "answer": f"2 + 2 <<2+2=4>>\n\n#### {a}"},
    "MATH": lambda q, a: {"problem": q, "solution": f"It is {a}", "answer": a, "subject": "Number Theory", "level": 2},
    "problem": lambda q, a: {"problem": q, "answer": a, "explanation": None},
}


@pytest.mark.parametrize("name", EXERCISES)
@searched
@given(some_text, some_text)
def test_every_form_asks_the_same_and_wants_the_same(name, question, answer):
    assume("\n" not in answer.strip() and "#" not in answer)
    row = EXERCISES[name](question, answer)
    found = exercise_of(row, "questions")
    assert (found.text, found.wanted) == (question, answer.strip())
    assert found.reference in row.values(), "the reference is the answer as the file has it"


def test_forms_of_exercises_and_what_is_no_exercise(tmp_path):
    made = [tuple(make("a", "b")) for make in EXERCISES.values()]
    for entry in EXERCISE_FORMATS:
        assert entry.form != "questions" or any({*entry.fields} <= {*fields} for fields in made)
    assert exercise_of({"question": "a", "answer": "#### 4\nor more"}, "questions").wanted == "#### 4\nor more"
    for row, words in (
        ({"question": "a", "answer": ["b"]}, '"answer" is an array'),
        ({"question": "a", "answer": "b", "system": "c"}, '"system" carries text'),
        ({"question": "a", "answer": "b", "choices": ["b", "c"]}, '"choices" carries text'),
        ({"question": "a", "answer": None}, '"answer" is missing'),
    ):
        with pytest.raises(ValueError, match=words):
            exercise_of(row, "questions")
    rows = [make("a", "b") for make in EXERCISES.values()]
    assert len(list(read_exercises(written(tmp_path, rows), "questions"))) == len(rows)


def test_a_worked_answer_is_learnt_as_the_file_has_it():
    row = EXERCISES["GSM8K"]("a", "4")
    assert messages_of(row)[-1]["content"] == row["answer"]


# -- the kind of a file ------------------------------------------------------------------------------------------------

TRAINED = ("pairs", "choices", "poems", "open", "chat", "questions", "text")


def test_a_file_is_of_the_kind_of_most_of_its_first_rows_for_every_command(tmp_path):
    gsm, alpaca = EXERCISES["GSM8K"]("a", "4"), {"instruction": "a", "output": "b", "text": "Below is a"}
    for rows, kinds in (
        ([gsm], ["chat", "questions"]),
        ([alpaca, {"text": "a"}, alpaca], ["chat", "text"]),
        ([question(0, text="a b")], ["choices", "text"]),
        ([{"x": "a"}, {"text": "b"}, {"x": "c"}], ["text"]),
        ([{"prompt": "a", "chosen": "b", "rejected": "c", "text": None}], ["pairs"]),
        ([{"x": "a"}], []),
    ):
        path = written(tmp_path, rows)
        assert kinds_of_rows(path, TRAINED, BadRows()) == kinds
        assert kinds_of_rows(path, TRAINED[::-1], BadRows()) == kinds[::-1]
    assert kinds_of_rows(path, TRAINED, BadRows(), "chat") == ["chat"]


@pytest.mark.parametrize(
    "row, reader",
    [
        ({"instruction": "a", "output": "b"}, "conversations, which scripts.train.train_sft_minimind reads"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "pairs of replies, which scripts.train.train_dpo_minimind"),
        (question(0), "multiple choice, which scripts.eval.likelihood reads"),
        ({"content": "a"}, ""),
    ],
)
def test_rows_of_another_kind_are_refused_with_the_command_that_reads_them(row, reader, tmp_path, small):
    data = PretrainData(data=written(tmp_path, [row]), cache_dir=tmp_path / "cache", val_fraction=0)
    with pytest.raises(ValueError, match='row 1: field "text" is missing') as error:
        PretrainDataset(data, small)
    assert reader in str(error.value) and ("; the rows are" in str(error.value)) == bool(reader)
    if not reader:
        assert len(PretrainDataset(replace(data, jsonl_field="content"), small).train) == 1


def test_what_is_left_out_is_said(tmp_path):
    path = written(tmp_path, [{"instruction": "a", "output": "b", "text": "Below is a"}])
    assert "--kind text reads the field text" in note_on_others(path, ["chat", "text"], "--kind")
    assert note_on_others(path, ["chat"], "--kind") == note_on_explanations(path) == ""
    assert "scripts.train.train_pretrain" in note_on_training(path, "chat") != note_on_training(path, "text")
    assert "scripts.train.train_sft_minimind" in note_on_training(path, "text")
    assert note_on_training(written(tmp_path, [{"messages": []}]), "chat") == note_on_training(None, "text") == ""
    assert "explanation stands" in note_on_explanations(
        written(tmp_path, [question(0, explanation="a b"), question(1)])
    )
