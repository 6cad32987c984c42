"""What a data file may hold, what is refused and in which words, and the split rule."""

import gzip
import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset.content import is_validation
from dataset.reading.bad_rows import BadRows
from dataset.reading.documents import read_documents
from dataset.reading.rows import read_rows

ROWS = [{"text": "one"}, {"text": "二, 三"}, {"text": "four\nlines", "n": 4}]


def write_rows(path, rows=ROWS):
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def refusal(read, *args, error=ValueError) -> str:
    """The message of the error that reading to the end raises: always one line that begins with the file."""
    with pytest.raises(error) as caught:
        list(read(*args))
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    assert message.startswith(str(args[0]))
    return message


# Reading


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "A.JSONL.GZ"])
def test_plain_and_compressed_files_hold_the_same_rows(tmp_path, name):
    data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.lower().endswith("gz") else data)
    assert list(read_rows(path)) == list(enumerate(ROWS, start=1))


def test_row_numbers_are_the_physical_lines_an_editor_shows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\n{"text": "a"}\n\n  \n{"text": "b"}')
    assert [(number, row["text"]) for number, row in read_rows(path)] == [(2, "a"), (5, "b")]


@pytest.mark.parametrize(
    "data",
    [
        b'\xef\xbb\xbf{"text": "a"}\n{"text": "b"}\n',
        b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n',
        b'\xef\xbb\xbf\r\n{"text": "a"}\r\n{"text": "b"}',
    ],
)
def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path, data):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    assert list(read_documents(path)) == ["a", "b"]


def test_null_characters_and_surrogate_pairs_are_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(rb'{"text": "a\u0000b \ud83d\ude42 \\ud800"}')
    assert list(read_documents(path)) == ["a\0b \U0001f642 \\ud800"]


def test_separator_follows_every_jsonl_text_but_empty_ones(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "a"}, {"text": ""}, {"text": "b"}])
    assert list(read_documents(path, separator="|")) == ["a|", "", "b|"]


def test_rows_are_read_one_at_a_time(tmp_path):
    """A fault further down does not keep the rows above it from being read."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\nbroken\n')
    assert next(read_documents(path)) == "a"


def test_observer_sees_every_byte_of_the_unpacked_file(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    data = b'\xef\xbb\xbf\n{"text": "a"}\r\n\n{"text": "b"}'
    path.write_bytes(gzip.compress(data))
    seen = []
    list(read_rows(path, seen.append))
    assert b"".join(seen) == data


# Text files


line = st.one_of(st.just("\n"), st.just(" \r\n"), st.integers(0, 5000).map(lambda n: "字a" * (n // 2) + "\n"))


@given(st.lists(line, min_size=1, max_size=30), st.sampled_from(["", "tail", "\r", "\ufeff"]))
def test_documents_of_a_text_file_joined_are_its_text(tmp_path_factory, lines, tail):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    text = "".join(lines) + tail
    path.write_bytes(b"\xef\xbb\xbf" + text.encode("utf-8"))
    documents = list(read_documents(path))
    assert "".join(documents) == text
    assert all(document.endswith("\n") for document in documents[:-1])
    longest_line = max(map(len, text.splitlines(keepends=True)))
    assert all(len(document) <= max(2000, 1000 + longest_line) for document in documents)
    assert all(len(document) >= 1000 for document in documents[:-1])


def test_text_is_cut_at_a_blank_line_where_there_is_one(tmp_path):
    path = tmp_path / "a.txt"
    paragraph = "x" * 399 + "\n"
    path.write_text((paragraph * 3 + "\n" + paragraph) * 3, encoding="utf-8", newline="")
    assert list(read_documents(path))[0] == paragraph * 3 + "\n"


def test_a_long_line_is_never_cut(tmp_path):
    path = tmp_path / "a.txt"
    lines = [letter * 9000 + "\n" for letter in "abc"]
    path.write_text("".join(lines), encoding="utf-8", newline="")
    assert list(read_documents(path, separator="ignored")) == lines


# Refusals


@pytest.mark.parametrize(
    ("second_line", "says"),
    [
        (b'{"content": "x", "id": 1}', 'field "text" is missing; fields present: content, id (choose one with --'),
        (b"{}", "fields present: none"),
        (b'{"a\\nb": 1}', r"a\nb"),
        (b'{"text": 5}', 'field "text" is a number, expected a string'),
        (b'{"text": null}', 'field "text" is null, expected a string'),
        (b'{"text": ["x"]}', 'field "text" is an array, expected a string'),
        (b'{"text": "x"', "not valid JSON at column 13"),
        (b'{"text": "x",}', "not valid JSON at column 1"),
        (b"[1]", "expected an object"),
        (b'"x"', "found a string"),
        (b"7", "found a number"),
        (b"null", "found null"),
        (b'{"text": "caf\xe9"}', "not UTF-8 (byte 0xe9 at byte offset 13 of the row)"),
        (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
        (rb'{"text": "\ud800"}', r"\ud800 is half a surrogate pair"),
        (rb'{"other": ["\uDC01"], "text": "x"}', r"\udc01 is half a surrogate pair"),
        (b'{"text": "x", "n": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"text": "x", "n": ' + b"[" * 200 + b"]" * 200 + b"}", "nested too deeply"),
        (b'{"text": "x", "n": ' + b"1" * 5000 + b"}", "value has 5000 digits; correct or delete that row"),
        (b'{"text": "x", "text": "x"}', 'key "text" stands twice'),
        (b'{"text": "x", "n": [{"a": 1, "b": 2, "a": 1}]}', 'key "a" stands twice'),
        (b'{"' + b"k" * 10**6 + b'": 1}', "kkk"),
    ],
)
@pytest.mark.parametrize("name", ["bad.jsonl", "bad.jsonl.gz"])
def test_a_bad_row_is_refused_in_one_sentence_with_its_number(tmp_path, name, second_line, says):
    path = tmp_path / name
    data = b'{"text": "fine"}\n\n' + second_line + b"\n"
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    message = refusal(read_documents, path)
    assert message.startswith(f"{path}, row 3: ")
    assert says in message


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", b"", "has no rows"),
        ("a.jsonl.gz", b"", "has no rows"),
        ("a.jsonl", b"\n \n\xef\xbb\xbf"[:3], "has no rows"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b"fine\nb\xffd\n", "row 2: not UTF-8 (byte 0xff at byte offset 1 of the row)"),
        ("a.jsonl.gz", b'{"text": "plain"}', "is not a gzip file"),
        ("a.jsonl", gzip.compress(b'{"text": "x"}', mtime=0), "rename it to end in .gz"),
        ("a.parquet.gz", b"", "unknown file type"),
        ("a.xlsx", b"", "unknown file type"),
        ("jsonl", b"", "unknown file type"),
    ],
)
def test_a_bad_file_is_refused_in_one_sentence(tmp_path, name, data, says):
    path = tmp_path / name
    path.write_bytes(data)
    assert says in refusal(read_documents, path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-4],
        lambda data: data[:-8] + bytes(8),
        lambda data: data + b"garbage",
        lambda data: data[:200] + bytes(200) + data[400:],
    ],
)
def test_a_damaged_gzip_file_is_refused_even_where_bad_rows_are_skipped(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    whole = gzip.compress("".join(json.dumps({"text": str(i**5)}) + "\n" for i in range(2000)).encode())
    path.write_bytes(damage(whole))
    for bad in (BadRows(), BadRows("skip")):
        message = refusal(read_documents, path, "text", bad)
        assert "after row" not in message, "the text of a megabyte is unpacked before the first row comes"
        assert "download it again" in message


def test_the_place_of_a_gzip_fault_is_said_to_be_after_the_rows_that_were_read(tmp_path):
    whole = gzip.compress("".join(json.dumps({"text": f"{i**9:0999}"}) + "\n" for i in range(1500)).encode())
    path, read = tmp_path / "a.jsonl.gz", []
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="the gzip file is cut short") as caught:
        for text in read_documents(path):
            read.append(text)
    assert 1000 < len(read) < 1500 and f"{path}, somewhere after row {len(read)}: " in str(caught.value)


def test_missing_files_and_directories_are_refused_with_a_remedy(tmp_path):
    assert "download" in refusal(read_documents, tmp_path / "absent.jsonl", error=FileNotFoundError)
    assert "is a folder" in refusal(read_documents, tmp_path)
    (tmp_path / "folder.jsonl").mkdir()
    assert "is a folder" in refusal(read_documents, tmp_path / "folder.jsonl")


# The split


@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(0, 1))
def test_the_split_is_a_function_of_the_content(content, fraction):
    first = hashlib.sha256(content.strip().encode("utf-8")).hexdigest()[:16]
    assert is_validation(content, fraction) == (int(first, 16) < fraction * 2**64)
    assert is_validation(f" \n{content}\u3000", fraction) == is_validation(content, fraction)
    assert not is_validation(content, 0.0)
    assert is_validation(content, 1.0)


def test_the_split_takes_the_share_asked_for_and_grows_with_it():
    texts = [f"document {i}" for i in range(20_000)]
    small, large = ({text for text in texts if is_validation(text, share)} for share in (0.01, 0.05))
    assert small < large
    assert abs(len(large) - 1000) < 4 * (20_000 * 0.05 * 0.95) ** 0.5
