import json
import re

import pytest

from dataset.content import language_of
from dataset.corpus import bundled
from dataset.corpus.facts import HELD_OUT_SUMS, facts, one_way_capitals
from dataset.corpus.tables import CAPITALS_ONE_WAY
from dataset.pretrain import PretrainData, PretrainDataset
from dataset.rows.formats import messages_of
from dataset.sft import SFTData, SFTDataset
from dataset.tokenizer import encode, train_bpe
from scripts.engine.statistics import is_correct

DIGITS = re.compile(r"\d+")
WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
    "seventeen eighteen nineteen twenty"
)


@pytest.fixture(scope="module")
def made():
    return {name: make() for name, make in bundled.FILES.items()}


def said(row):
    """All texts of a row of any file."""
    if "text" in row:
        return [row["text"]]
    if "question" in row:
        return [row["question"], *row.get("choices", [row["answer"]])]
    return [message["content"] for turns in row.values() for message in turns]


def training(made):
    return [row for name in ("pretrain", "sft", "preferences") for row in made[name]]


def test_there_are_twenty_thousand_distinct_documents_and_as_many_conversations(made):
    for name in ("pretrain", "sft"):
        assert len({json.dumps(row) for row in made[name]}) == len(made[name]) >= 20_000
    assert len({json.dumps(row) for row in made["preferences"]}) == len(made["preferences"]) >= 2_000
    for name in ("questions", "choices"):
        assert len({(row["question"], row["split"]) for row in made[name]}) == len(made[name]) >= 500


def test_both_languages_have_a_good_share_of_every_file(made):
    for name, rows in made.items():
        texts = [row["question"] if "question" in row else said(row)[-1] for row in rows]
        chinese = sum(language_of(text) == "zh" or "。" in text or "？" in text for text in texts)
        assert 0.3 < chinese / len(texts) < 0.7, name


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A cache directory that holds the bundled files."""
    folder = tmp_path_factory.mktemp("cache")
    bundled.bundled_file("sft", folder)
    return folder


def test_the_files_are_the_same_bytes_every_time(written, made, tmp_path):
    bundled.write(tmp_path)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(f"{name}.jsonl" for name in bundled.FILES)
    for name in bundled.FILES:
        content = (tmp_path / f"{name}.jsonl").read_bytes()
        assert content == bundled.bundled_file(name, written).read_bytes()
        assert [json.loads(line) for line in content.decode("utf-8").splitlines()] == made[name]


def test_places_are_the_same_in_every_process():
    assert [bundled.place_of(1000, "a", 1, ("b", "乙")), bundled.place_of(7, "seven")] == [770, 5]


def numbers(text):
    """Numbers of a text, in digits or words; written apart from the corpus's own reader."""
    words = {word: number for number, word in enumerate(WORDS.split())}
    units = {c: n for n, c in enumerate("零一二三四五六七八九")} | {"两": 2}

    def value(token):
        if token.isascii():
            return int(token) if token.isdigit() else words[token.lower()]
        if "十" not in token:
            return units[token[-1]]
        tens, ones = token.split("十", 1)
        return 10 * (units[tens[-1]] if tens else 1) + (units[ones[0]] if ones else 0)

    pattern = r"\d+|\b(?:" + "|".join(sorted(words, key=len, reverse=True)) + r")\b|[零一二两三四五六七八九十]+"
    return [value(token) for token in re.findall(pattern, text, re.IGNORECASE)]


def test_no_training_row_tells_a_held_out_sum(made):
    assert len(HELD_OUT_SUMS) >= 15
    for row in training(made):
        for text in [*said(row), "\n".join(said(row)[-2:])]:
            found = numbers(text)
            for place in range(len(found) - 2):
                low, middle, high = sorted(found[place : place + 3])
                assert low + middle != high or (low, middle) not in HELD_OUT_SUMS, row


def test_the_unseen_sums_are_the_held_out_ones_in_both_orders_and_languages(made):
    asked = set()
    for row in made["questions"]:
        if row["split"] == "unseen_sums":
            a, b = map(int, DIGITS.findall(row["question"]))
            assert int(row["answer"]) == a + b
            asked.add((row["lang"], a, b))
    assert asked == {(lang, *pair) for lang in ("en", "zh") for p in HELD_OUT_SUMS for pair in (p, p[::-1])}


def test_of_a_one_way_capital_the_country_never_comes_first(made):
    capitals = {c: k for row in CAPITALS_ONE_WAY for k, c in ((row[0], row[1]), (row[2], row[3]))}
    either, told = re.compile("|".join(capitals)), dict.fromkeys(capitals, 0)
    for row in training(made):
        for turns in [row["chosen"], row["rejected"]] if "chosen" in row else [None]:
            text = "\n".join(m["content"] for m in turns) if turns else "\n".join(said(row))
            for capital in set(either.findall(text)):
                if capitals[capital] in text:
                    assert text.rindex(capital) < text.index(capitals[capital]), row
                    told[capital] += 1
    assert min(told.values()) >= 5, "not taught in the other direction"


def test_the_reversed_questions_ask_for_the_capitals_of_the_one_way_countries(made):
    asked = {(row["lang"], row["answer"]) for row in made["questions"] if row["split"] == "reversed"}
    assert asked == {pair for row in CAPITALS_ONE_WAY for pair in (("en", row[1]), ("zh", row[3]))}


def test_no_question_is_asked_in_training(made):
    asked = [
        m["content"] for row in training(made) for turns in row.values() if turns != row.get("text") for m in turns
    ]
    openings = [opening for forms in bundled.OPENINGS.values() for opening in forms]
    known = set(asked)
    for row in made["questions"]:
        assert not any(opening.format(row["question"]) in known for opening in openings), row


def test_who_it_is_is_asked_in_known_words_behind_another_opening(made):
    alone = {row["conversations"][0]["content"] for row in made["sft"] if len(row["conversations"]) == 2}
    asked = [row["question"] for row in made["questions"] if row["kind"] == "identity"]
    assert len(asked) >= 30
    for question in asked:
        assert question not in alone
        assert re.split("。|，|！|[.!] ", question, maxsplit=1)[1] in alone


def test_every_answer_to_a_seen_question_is_taught(made):
    replies = {row["conversations"][-1]["content"] for row in made["sft"] if len(said(row)[-1]) < 80}
    answers = {row["answer"] for row in made["questions"] if row["split"] == "seen"}
    assert not [answer for answer in answers if not any(is_correct(reply, answer) for reply in replies)]


def test_every_equation_is_true(made):
    found = 0
    for row in made["pretrain"] + made["sft"]:
        for a, sign, b, c in re.findall(r"(\d+) ([-+×]) (\d+) = (\d+)", "\n".join(said(row))):
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "×": int(a) * int(b)}[sign] == int(c), row
            found += 1
        for text in said(row):
            for a, sign, b, c in re.findall(r"(\d+)(加|减|乘)(\d+)等于(\d+)", text):
                assert {"加": int(a) + int(b), "减": int(a) - int(b), "乘": int(a) * int(b)}[sign] == int(c), row
                found += 1
    assert found > 3_000


def test_texts_are_whole_and_well_set(made):
    for name, rows in made.items():
        for row in rows if name != "words" else ():
            for text in said(row):
                assert not re.search(r"  |[{}|]|\n|^\s|\s$|(?<!=) [,.!?]|[,.!?。，！？]{2}|[，。！？] ", text), text
                if text[0].isascii() and language_of(text) != "zh" and "。" not in text:
                    assert not re.match(r"[a-z]", text) or "text" not in row, text
    for row in made["pretrain"] + made["sft"]:
        assert re.search(r'[.!?。！？=][”"]?$', said(row)[-1]), row


def test_conversations_are_accepted_by_fine_tuning(made):
    for row in made["sft"]:
        turns = messages_of(row)
        assert [m["role"] for m in turns] == ["user", "assistant"] * (len(turns) // 2)
    assert any(len(row["conversations"]) == 4 for row in made["sft"])


def test_preferred_and_rejected_answer_the_same_prompt_differently(made):
    for row in made["preferences"]:
        assert row["chosen"][:-1] == row["rejected"][:-1]
        assert row["chosen"][-1]["content"] != row["rejected"][-1]["content"]
        assert messages_of({"messages": row["chosen"]}) and messages_of({"messages": row["rejected"]})


def test_the_right_choice_holds_the_answer_and_no_other_does(made):
    answers = {(row["question"], row["split"]): row["answer"] for row in made["questions"]}
    places = [0] * bundled.NUM_CHOICES
    for row in made["choices"]:
        answer = answers[row["question"], row["split"]]
        held = [is_correct(choice.replace(row["question"], ""), answer, row["question"]) for choice in row["choices"]]
        assert held[row["answer"]], row
        assert len(set(row["choices"])) == bundled.NUM_CHOICES
        places[row["answer"]] += 1
    assert min(places) > len(made["choices"]) / 8


def test_without_data_the_bundled_rows_are_learnt_and_the_header_says_so(small, made, written):
    pretrain = PretrainDataset(PretrainData(cache_dir=written), small)
    assert pretrain.meta["rows"] == len(made["pretrain"])
    assert pretrain.describe().startswith("no --data, so the bundled corpus is used: ")
    sft = SFTDataset(SFTData(cache_dir=written), small, all_replies=True, rows_per_step=1)
    assert sft.meta["conversations"] == len(made["sft"])
    assert sft.describe().startswith("no --data, so the bundled conversations are used: ")


def test_given_data_is_used_and_nothing_is_said_of_the_bundled_corpus(small, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(f'{{"text": "row {n}"}}\n' for n in range(9)), encoding="utf-8")
    described = PretrainDataset(PretrainData(data=path, cache_dir=tmp_path / "cache"), small).describe()
    assert described.startswith(f"{path}: 9 rows")
    assert not list(tmp_path.glob("cache/bundled-*"))


def test_an_incomplete_folder_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(bundled, "FILES", {name: lambda: [{"text": "甲"}] for name in bundled.FILES})
    path = bundled.bundled_file("sft", tmp_path)
    path.unlink()
    assert bundled.bundled_file("sft", tmp_path).read_bytes() == '{"text": "甲"}\n'.encode()
    assert [*tmp_path.glob("*/")] == [path.parent]


@pytest.mark.slow
def test_no_token_holds_a_fact(made):
    """Trained on whole sentences, BPE merges frequent ones into single tokens, capital and country together."""
    tokenizer = train_bpe((row["text"] for row in made["words"]), 4096)
    for fact in (*facts(), *one_way_capitals()):
        names = {name for name in fact.fields.values() if len(name) > 1 and not name.isdigit()}
        for sentence in (*fact.statements, *(text for exchange in fact.exchanges for text in exchange)):
            for token in encode(tokenizer, sentence):
                held = [name for name in names if name in tokenizer.decode([token])]
                whole = max(held, key=len, default="")
                assert all(name in whole for name in held), (sentence, held)
