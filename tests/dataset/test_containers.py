"""Containers of rows: the same rows in any of them, in bounded pieces, and faults that are of the file."""

import csv
import gzip
import io
import json
import string
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset.pretrain import PretrainData, PretrainDataset
from dataset.reading import files, rows
from dataset.reading.bad_rows import BadRows
from dataset.reading.documents import read_documents
from dataset.reading.files import data_files
from dataset.reading.rows import read_rows
from dataset.sft import SFTData, SFTDataset
from dataset.survey import Survey

NAMES = ("instruction", "output", "名")
CONTENTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
TABLES = st.lists(st.fixed_dictionaries(dict.fromkeys(NAMES, CONTENTS)), min_size=1, max_size=8)
SCALARS = st.one_of(CONTENTS, st.none(), st.booleans(), st.integers(-(2**60), 2**60), st.floats(allow_nan=False))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(CONTENTS, inner, max_size=3), max_leaves=6
)
OBJECTS = st.lists(st.dictionaries(CONTENTS, VALUES, max_size=4), min_size=1, max_size=8)


def in_lines(table) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table).encode()


def in_array(table) -> bytes:
    return json.dumps(table, ensure_ascii=False, indent=1).encode()


def in_csv(table, delimiter=",", end="\n") -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, [*table[0]], delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue().encode()


def in_parquet(table) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(table), buffer, row_group_size=3)
    return buffer.getvalue()


def in_zstandard(data: bytes) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as stream:
        stream.write(data)
    return buffer.getvalue().to_pybytes()


WRITERS = {
    "rows.jsonl": in_lines,
    "lines.json": in_lines,
    "rows.json": in_array,
    "rows.csv": in_csv,
    "rows.tsv": lambda table: in_csv(table, "\t", "\r\n"),
    "rows.parquet": in_parquet,
    "rows.jsonl.gz": lambda table: gzip.compress(in_lines(table)),
    "rows.json.gz": lambda table: gzip.compress(in_array(table)),
    "rows.csv.zst": lambda table: in_zstandard(in_csv(table)),
    "rows.jsonl.zst": lambda table: in_zstandard(in_lines(table)),
}


def values(path, bad=None) -> list[dict]:
    return [row for _, row in read_rows(path, bad=bad)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_container_gives_the_rows_that_were_written_to_it(tmp_path, name):
    path, observed = tmp_path / name, []

    @settings(max_examples=60, deadline=None)
    @given(TABLES)
    def check(table):
        path.write_bytes(WRITERS[name](table))
        observed.clear()
        assert [row for _, row in read_rows(path, observed.append)] == table
        unpacked = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
        assert name.endswith(".zst") or b"".join(observed) == unpacked, "what is hashed is the whole text"

    check()


@pytest.mark.parametrize("buffer", [2, 3, 64])
def test_an_array_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, buffer):
    path = tmp_path / "rows.json"
    monkeypatch.setattr(files, "BUFFER", buffer)

    @settings(max_examples=60, deadline=None)
    @given(OBJECTS, st.sampled_from([None, 1]), st.booleans())
    def check(table, indent, ascii_only):
        path.write_bytes(
            b"\xef\xbb\xbf \n" + json.dumps(table, indent=indent, ensure_ascii=ascii_only).encode() + b"\n "
        )
        assert values(path) == table

    check()


@settings(max_examples=150, deadline=None)
@given(OBJECTS, st.text(string.printable, max_size=3), st.integers(0, 10**6))
def test_a_damaged_array_ends_in_a_sentence_or_in_other_rows(tmp_path_factory, table, noise, place):
    path = tmp_path_factory.getbasetemp() / "damaged.json"
    text = json.dumps(table)
    place %= len(text)
    path.write_text(text[:place] + noise + text[place + 1 :], encoding="utf-8")
    try:
        got = values(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert got == json.loads(path.read_text(encoding="utf-8"))


def test_an_element_that_is_no_row_is_skipped_but_a_broken_array_ends_the_reading(tmp_path):
    path, bad = tmp_path / "a.json", BadRows("skip")
    path.write_text(
        '[{"text": "a"}, 7, {"k": 1, "k": 2}, "b", {"text": "\\ud800"}, [], {"text": "c"}]', encoding="utf-8"
    )
    assert values(path, bad) == [{"text": "a"}, {"text": "c"}]
    assert [line.partition(":")[0] for line in bad.first] == [f"row {n}" for n in (2, 3, 4, 5, 6)]
    path.write_text('[{"text": "a"}, {"text": }, {"text": "c"}]', encoding="utf-8")
    with pytest.raises(ValueError, match="row 2: not valid JSON"):
        values(path, BadRows("skip"))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "a;b\n1;2\n", "separated by ';'"),
        ("a.csv", '"a";"b"\n"1";"2"\n', "with ',' between them"),
        ("a.csv", "a\tb\n1\t2\n", "rename it to end in .tsv"),
        ("a.csv", "a,b,a\n1,2,3\n", 'two columns of the first line have the name "a"'),
        ("a.csv", "a,b\n", "has no rows"),
        ("a.csv", 'a,"b\n', "row 1: not valid CSV"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', "row 2: not valid CSV"),
        ("a.csv", "a,b\n1,2\n3\n", "row 3: 1 cells for 2 columns"),
        ("a.json", '"text"', "expected an array"),
        ("a.json", '{"data":\n [{"a": 1}]}', "a single object"),
        ("a.json", "[]", "has no rows"),
        ("a.json", '[{"a": 1}', 'expected "," or "]"'),
        ("a.json", '[{"a": 1} {"a": 2}]', 'row 2: expected "," or "]"'),
        ("a.json", '[{"a": "\udce4\udcb8', "cut short"),
        ("a.json", '[{"a": 1}] x', "after the array of 1 rows stands 'x'"),
        ("a.jsonl", '[{"a": 1}]', "name a file of one array .json"),
        ("a.parquet", "text", "no Parquet file"),
        ("a.txt", "text", "plain text"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text, says):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    path = tmp_path / name
    path.write_text(text, "utf-8", "surrogateescape")
    with pytest.raises(ValueError) as caught:
        values(path)
    assert str(path) in str(caught.value) and says in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "gb18030", "cp1252"])
@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "txt", "txt.gz"])
def test_another_encoding_is_a_fault_of_the_file(tmp_path, encoding, suffix):
    words = "déjà vu, naïve" if encoding == "cp1252" else "English words 和中文的词语，句号。"
    table = [{"text": f"{words} {number}"} for number in range(20)]
    lines = {"json": in_array, "csv": in_csv}.get(suffix.removesuffix(".gz"), in_lines)(table)
    data, path = lines.decode().encode(encoding), tmp_path / f"a.{suffix}"
    path.write_bytes(gzip.compress(data) if suffix.endswith("gz") else data)
    with pytest.raises(ValueError) as caught:
        [*read_documents(path, bad=BadRows("skip"))]
    message = str(caught.value)
    assert "is not UTF-8 but" in message and "iconv" in message
    assert encoding[:6].upper().replace("-", "") in message.upper().replace("-", "")
    subprocess.run(message.partition("for example by: ")[2], shell=True, check=True, cwd=tmp_path)
    converted = (tmp_path / f"utf8_a.{suffix.removesuffix('.gz')}").read_bytes()
    assert converted.decode("utf-8-sig") == lines.decode()


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "txt"])
@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "gb18030"])
def test_chinese_alone_in_one_line_shows_its_encoding(tmp_path, encoding, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(("天气很好我们去公园玩吧上海北京" * 3000).encode(encoding))
    with pytest.raises(ValueError, match=f"(?i)not UTF-8 but {encoding.replace('utf-16-', 'utf-16')}"):
        [*read_documents(path, bad=BadRows("skip"))]


@pytest.mark.parametrize(
    "encoding, line", [("big5", "今天天氣很好，我們去公園玩。"), ("shift_jis", "今日はいい天気です。")]
)
def test_no_remedy_that_would_spoil_a_text(tmp_path, encoding, line):
    path = tmp_path / "a.txt"
    path.write_bytes(f"{line}\n".encode(encoding) * 9)
    with pytest.raises(ValueError, match="iconv -f ENCODING"):
        [*read_documents(path)]


def test_one_bad_line_among_good_ones_is_a_fault_of_its_row(tmp_path):
    path, bad = tmp_path / "a.txt", BadRows("skip")
    path.write_bytes("中文的词语，句号。\n".encode()[1:] * 2)
    with pytest.raises(ValueError, match="row 1"):
        [*read_documents(path)]
    path.write_bytes("中文\n".encode() * 5 + b"\xd6\xd0\n" * 9)
    assert "".join(read_documents(path, bad=bad)) == "中文\n" * 5 and bad.count == 9


def test_bytes_in_a_table_are_refused_and_dates_are_text(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path, bad = tmp_path / "a.parquet", BadRows("skip")
    table = pyarrow.table({"day": pyarrow.array([3, 4], pyarrow.date32()), "picture": [b"\x00", None]})
    parquet.write_table(table, path)
    assert values(path, bad) == [{"day": "1970-01-05", "picture": None}]
    assert 'column "picture" holds bytes' in bad.first[0]


def test_a_missing_package_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    for name in ("a.parquet", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(ValueError, match="--extra parquet"):
            values(tmp_path / name)


# -- several files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path):
    """A folder of three files with 30 conversations, some in each container, and their rows in one file beside it."""
    table = [{"instruction": f"say {number} 次", "output": "yes " * number} for number in range(1, 31)]
    folder = tmp_path / "shards"
    (folder / "more").mkdir(parents=True)
    for name in ("README.md", "dataset_infos.json"):
        (folder / name).write_text("about", encoding="utf-8")
    for name, part in zip(("a.jsonl", "b.csv", "more/c.json.gz"), (table[:10], table[10:20], table[20:]), strict=True):
        (folder / name).write_bytes(WRITERS[f"rows.{name.partition('.')[2]}"](part))
    (tmp_path / "one.jsonl").write_bytes(in_lines(table))
    return folder


@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_a_pattern_and_a_list_train_as_one_file_with_their_rows(shards, small, streaming):
    def rows_of(data):
        flags = {"streaming": True, "steps_per_epoch": 4} if streaming else {}
        config = SFTData(data=data, cache_dir=shards.parent / "cache", max_seq_len=64, val_fraction=0.2, **flags)
        made = SFTDataset(config, small, all_replies=True, rows_per_step=4)
        return [made.train.batch(i)["input_ids"].tolist() for i in ([0, 1, 2, 3], [4, 5, 6, 7])]

    expected = rows_of(shards.parent / "one.jsonl")
    names = [shards, shards / "**" / "[abc].*", ",".join(str(shards / name) for name in ("a.jsonl", "b.csv", "more"))]
    for name in names:
        assert rows_of(type(shards)(name)) == expected


def test_a_change_of_any_file_makes_another_cache(shards, small):
    def tokens():
        config = PretrainData(data=shards, jsonl_field="output", cache_dir=shards.parent / "cache", val_fraction=0)
        return PretrainDataset(config, small).meta["train_tokens"]

    before = tokens()
    (shards / "b.csv").write_bytes(in_csv([{"instruction": "say", "output": "no"}]))
    assert tokens() < before


def test_a_stream_is_identified_by_all_its_files(shards, small):
    def sketch():
        flags = {"streaming": True, "steps_per_epoch": 1, "val_fraction": 0}
        return SFTDataset(SFTData(data=shards, **flags), small, all_replies=True, rows_per_step=4).meta["data_sha256"]

    before = sketch()
    (shards / "more" / "c.json.gz").unlink()
    assert sketch() != before


def test_bad_rows_and_copies_of_several_files_are_named_with_their_file(shards, small):
    (shards / "a.jsonl").write_text('{"instruction": "q"}\n{"instruction": "q", "output": "yes"}\n', encoding="utf-8")
    (shards / "b.csv").write_text("instruction,output\nq,yes\nq\n", encoding="utf-8")
    survey = Survey(data_files(shards), "chat", small, 64).result
    assert [place.partition(":")[0] for place in survey["first_bad"]] == ["a.jsonl, row 1", "b.csv, row 3"]
    assert survey["first_copies"] == [("2 of b.csv", "2 of a.jsonl")] and survey["longest"]["row"] == "10 of c.json.gz"
    config = SFTData(data=shards, cache_dir=shards.parent / "cache", on_bad_row="skip")
    meta = SFTDataset(config, small, all_replies=True, rows_per_step=4).meta
    assert meta["skipped_first"] == survey["first_bad"] and meta["data_sha256"] == survey["data_sha256"]


def test_a_pattern_may_match_folders_and_a_list_may_have_blanks(shards):
    (shards / "README.md").unlink()
    (shards / "dataset_infos.json").unlink()
    assert data_files(shards / "**") == data_files(shards)
    assert data_files(type(shards)(f"{shards / 'a.jsonl'} , {shards / 'b.csv'}")) == data_files(shards)[:2]


def test_names_that_stand_for_no_files_or_for_two_kinds_are_refused(shards):
    def refusal(name) -> str:
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            data_files(type(shards)(name))
        return str(caught.value)

    assert "no file matches" in refusal(shards / "*.parquet")
    assert "twice" in refusal(f"{shards},{shards / 'a.jsonl'}")
    assert "comma" in refusal(f"{shards / 'a.jsonl'},")
    for name in ("train-00000.jsonl", "test-00000.jsonl"):
        (shards / name).write_text("{}\n", encoding="utf-8")
    assert "test-00000.jsonl" in refusal(shards) and len(data_files(shards / "**" / "train*")) == 1
    (shards / "test-00000.jsonl").rename(shards / "testimony.jsonl")
    assert len(data_files(shards)) == 5
    for name in ("train-00000.jsonl", "testimony.jsonl"):
        (shards / name).unlink()
    (shards / "d.docx").write_bytes(b"")
    assert "d.docx" in refusal(shards) and "'" in refusal(shards)
    (shards / "d.docx").rename(shards / "d.txt")
    assert "plain text" in refusal(shards)
    (shards.parent / "empty").mkdir()
    assert "without data files" in refusal(shards.parent / "empty")


def test_every_container_has_a_reader():
    assert {*rows.READERS, files.PLAIN_TEXT} == {*files.CONTAINERS}
