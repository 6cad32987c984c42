"""Files of data: which ones a name stands for, what they contain, and their bytes, unpacked.

Lines are cut at b"\\n" in bytes and never through the platform's encoding, so one file means the same rows everywhere.
Every fault of a file is a ValueError (or FileNotFoundError) of one sentence: file, row, what was found, what to do.
"""

import glob
import gzip
import io
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType

Observer = Callable[[bytes], object]

PLAIN_TEXT = ".txt"
CONTAINERS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", PLAIN_TEXT)
PACKED = (".gz", ".zst")
DATA_HELP = "a file, a folder, a pattern in quotes, bundled:NAME, or several of these with commas"
EXPECTED = f"{', '.join(CONTAINERS)}, or {' or '.join(PACKED)} after it (not after .parquet)"
BESIDE_DATA = re.compile(  # in a folder, without being data
    r"\..*|(?:README|LICENSE|LICENCE).*|dataset_(?:infos?|dict)\.json", re.IGNORECASE
)
HELD_OUT = re.compile(r"(?:test|val|valid|validation|dev|eval)(?![a-z]).*", re.IGNORECASE)  # beside files of train
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BUFFER = 1 << 20  # bytes of text that are unpacked at a time
HEAD = 1 << 16  # bytes by which an encoding is recognised


# -- names -------------------------------------------------------------------------------------------------------------


def data_files(data: Path) -> tuple[Path, ...]:
    """The files that `data` names, in the order in which they are read.

    It is a file; a folder, which stands for all files in it, by name; a pattern such as data/*.jsonl; or several of
    these with commas between them. ValueError for a name without a file, a file given twice or of unknown type, and for
    plain text beside rows. A file that does not exist is named when it is opened.
    """
    names = [data]
    if not data.exists():
        parts = [part.strip() for part in str(data).split(",")]
        if "" in parts:
            raise ValueError(f"{data}: a comma has no name beside it; leave it out")
        names = [Path(part).expanduser() for part in parts]
    files = [file for name in names for file in _named(name)]
    places = Counter(file.resolve() for file in files)
    if twice := next((file for file in files if places[file.resolve()] > 1), None):
        raise ValueError(f"{data} names {twice} twice; leave one out")
    if len({is_plain_text(file) for file in files}) > 1:
        raise ValueError(f"{data} names plain text (.txt) and files of rows; give one kind, such as 'folder/*.jsonl'")
    return tuple(files)


def _named(name: Path) -> list[Path]:
    if name.is_dir():
        files = sorted(file for file in name.rglob("*") if file.is_file() and not BESIDE_DATA.fullmatch(file.name))
        if not files:
            raise ValueError(f"{name} is a folder without data files; expected names ending in {EXPECTED}")
        if unknown := [file for file in files if _container(file) is None]:
            raise ValueError(
                f"{name} holds {unknown[0].name}, which is no data file; choose files by a pattern such as "
                f"'{name}/*{_container(next(filter(_container, files), Path('x.jsonl')))}'"
            )
        held_out = [file.name for file in files if HELD_OUT.fullmatch(file.name)]
        if held_out and any(file.name.lower().startswith("train") for file in files):
            raise ValueError(
                f"{name} holds {held_out[0]} beside files for training; choose one kind by a pattern such as "
                f"'{name}/**/train*'"
            )
        return files
    if name.exists() or not glob.has_magic(str(name)):
        return [name]
    files = sorted(Path(file) for file in glob.glob(str(name), recursive=True))
    if "**" in name.parts:
        files = [file for file in files if file.is_file()]  # the files of folders match, too
    if not files:
        raise FileNotFoundError(f"no file matches {name}; check the pattern")
    return [file for match in files for file in _named(match)]


def _container(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
        if suffixes[-1:] == [".parquet"]:
            return None  # read from its end, so not as a stream
    return suffixes[-1] if suffixes and suffixes[-1] in CONTAINERS else None


def container_of(path: Path) -> str:
    """One of CONTAINERS, by the name of a file, plain or packed; ValueError for a directory or any other name."""
    _refuse_directory(path)
    container = _container(Path(path))
    if container is None:
        raise ValueError(f"{path}: unknown file type; expected a name ending in {EXPECTED}")
    return container


def is_plain_text(path: Path) -> bool:
    """Return whether a file is text without rows; ValueError as `container_of`."""
    return container_of(path) == PLAIN_TEXT


def is_packed(path: Path) -> bool:
    return Path(path).suffix.lower() in PACKED


def describe_files(files: tuple[Path, ...]) -> str:
    """The name of a file, or the number of several and the first and last name."""
    return str(files[0]) if len(files) == 1 else f"{len(files)} files, {files[0]} to {files[-1].name}"


def _refuse_directory(path: Path) -> None:
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; give the data file inside it")


# -- bytes -------------------------------------------------------------------------------------------------------------


def open_unpacked(path: Path) -> io.BufferedReader:
    """Open a file, plain or packed, for reading its text as bytes; FileNotFoundError or ValueError with a remedy."""
    path = Path(path)
    _refuse_directory(path)
    try:
        if path.suffix.lower() == ".gz":
            return io.BufferedReader(gzip.open(path, "rb"), BUFFER)
        if path.suffix.lower() == ".zst":
            pyarrow = arrow(path)
            return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"), BUFFER)
        return path.open("rb", buffering=HEAD)
    except FileNotFoundError:
        remedy = "check the path, or download the file as README.md shows"
        raise FileNotFoundError(f"{path} does not exist; {remedy}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); check its permissions") from error


def arrow(path: Path) -> ModuleType:
    """The package pyarrow, of the extra `parquet`, which this file needs."""
    try:
        import pyarrow.parquet
    except ImportError:
        remedy = "start the command by: uv run --extra parquet python -m ..."
        raise ValueError(f"{path} needs the package pyarrow; {remedy}") from None
    return pyarrow


def read_lines(path: Path, observe: Observer | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield (row number from 1, line with its line end) for every physical line, after observe(line).

    Row numbers count blank lines, too, as an editor shows them.
    """
    number = 0
    with open_unpacked(path) as file, _faults(path, lambda: f"row {number}" if number else ""):
        refuse_other_encodings(path, file.peek(HEAD))
        for number, line in enumerate(file, start=1):
            if observe is not None:
                observe(line)
            yield number, line


def read_chunks(path: Path, observe: Observer | None = None) -> Iterator[bytes]:
    """Yield the bytes of a file a megabyte at a time, each after observe(chunk)."""
    size = 0
    with open_unpacked(path) as file, _faults(path, lambda: f"megabyte {size // BUFFER}" if size else ""):
        for chunk in iter(partial(file.read, BUFFER), b""):
            size += len(chunk)
            if observe is not None:
                observe(chunk)
            yield chunk


@contextmanager
def _faults(path: Path, place: Callable[[], str]) -> Iterator[None]:
    """Turn errors of reading into sentences. place: what was read last, "" at the beginning."""
    try:
        yield
    except (EOFError, OSError, zlib.error) as error:
        packed = Path(path).suffix.lower().removeprefix(".") if is_packed(path) else ""
        # A file is read ahead, a packed one by a megabyte of its text.
        where = f"{path}, somewhere after {place()}" if place() else str(path)
        if not packed or (isinstance(error, OSError) and error.errno):
            reason = getattr(error, "strerror", None) or error
            raise ValueError(f"{where}: cannot be read on ({reason})") from error
        with Path(path).open("rb") as file:
            if packing_of(file.read(8)) != packed:
                fault = f"{path} is not a {PACKINGS[packed]} file although its name ends in .{packed}"
                raise ValueError(f"{fault}; rename it, or download it again") from None
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        fault = "cut short" if cut else f"damaged ({error})"
        raise ValueError(f"{where}: the {PACKINGS[packed]} file is {fault}; download it again") from None


# -- encodings ---------------------------------------------------------------------------------------------------------

PACKINGS = {"gz": "gzip", "zst": "Zstandard", "parquet": "Parquet", "zip": "zip"}  # by suffix
BEGINNINGS = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst", b"PAR1": "parquet", b"PK\x03\x04": "zip"}
WIDE_MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
FEW_LINES = 2  # that are not UTF-8: a fault of rows, unless they are GBK or UTF-16
FEW_CHARACTERS = 8  # by which a line or two are not taken to be GBK or UTF-16
UNKNOWN = "an encoding that cannot be told"


def packing_of(head: bytes) -> str | None:
    """The suffix that belongs to a file that begins with these bytes; None for text."""
    return next((packing for magic, packing in BEGINNINGS.items() if head.startswith(magic)), None)


def refuse_other_encodings(path: Path, head: bytes) -> None:
    """Raise ValueError if the text of a file, which begins with `head`, is not UTF-8 as a whole."""
    head = head[:HEAD]
    if packing := packing_of(head):
        name = PACKINGS[packing]
        remedy = "unpack it" if packing == "zip" else f"rename it to end in .{packing}"
        raise ValueError(f"{path} is a {name} file although its name does not say so; {remedy}")
    if encoding := other_encoding(head):
        known = "ENCODING" if encoding == UNKNOWN else encoding.partition(" ")[0]
        convert, name, given = f"iconv -f {known} -t UTF-8", Path(path).name, shlex.quote(str(path))
        if is_packed(path):
            convert = f"{'gzip' if name.lower().endswith('.gz') else 'zstd'} -dc {given} | {convert}"
            name, given = Path(name).stem, ""
        raise ValueError(
            f"{path} is not UTF-8 but {encoding}; save it as UTF-8, for example by: "
            f"{' '.join(filter(None, (convert, given)))} > {shlex.quote(f'utf8_{name}')}"
        )


def other_encoding(head: bytes) -> str | None:
    """The encoding of a text that begins with these bytes, if it is none of lines in UTF-8; else None."""
    # 1. Two or four bytes per character: by its mark, or by the zeros beside ASCII; not if a row alone is so damaged.
    if not any(map(_is_narrow, head.split(b"\n")[:-1])):
        if marked := next((name for mark, name in WIDE_MARKS.items() if head.startswith(mark)), None):
            return marked
        even, odd = head[::2].count(0), head[1::2].count(0)
        if max(even, odd) > len(head) / 8 and min(even, odd) < len(head) / 100:
            return "UTF-16LE" if odd > even else "UTF-16BE"
    # 2. Bytes: one good line is enough to make the others bad rows.
    lines = [line for line in head[: head.rfind(b"\n") + 1 or len(head)].splitlines() if not line.isascii()]
    if not lines or any(_decodes(line, "utf-8") for line in lines):
        return None
    if (second := _high_bytes_of_han(head)) is not None and not _decodes(head, "shift_jis"):
        return ("UTF-16BE", "UTF-16LE")[second]
    text = b"\n".join(lines)
    read = [character for character in text.decode("gb18030", "ignore") if not character.isascii()]
    common = len("".join(read).encode("gb2312", "ignore")) / 2
    few = len(lines) <= FEW_LINES
    if _decodes(text, "gb18030") and common > 0.8 * len(read) and (not few or common > FEW_CHARACTERS):
        return "GB18030 (GBK)"
    if few:
        return None
    # 3. No remedy that turns the text of another script into wrong letters: of European text few letters are accented.
    accented = sum(byte > 127 for byte in text)
    return "CP1252 or another encoding" if accented < len(text) / 4 else UNKNOWN


def _is_narrow(line: bytes) -> bool:
    """Return whether a line is UTF-8, and so long that UTF-16 would not look like it."""
    return len(line) >= 2 * FEW_CHARACTERS and b"\0" not in line and _decodes(line, "utf-8")


def _high_bytes_of_han(text: bytes) -> int | None:
    """0 or 1: the place in each pair of bytes of those that only Chinese in UTF-16 has there; None if it is not."""
    shares = [sum(0x4E <= byte <= 0x9F or byte in (0, 0x30, 0xFF) for byte in text[at::2]) for at in (0, 1)]
    first = shares[1] > shares[0]
    if len(text) <= 2 * FEW_CHARACTERS:
        return None
    return int(first) if shares[first] > 0.45 * len(text) and shares[not first] < 0.35 * len(text) else None


def _decodes(text: bytes, encoding: str) -> bool:
    """Return whether a text has this encoding; of a long one, the last character may be cut."""
    try:
        text.decode(encoding)
    except UnicodeDecodeError as error:
        return error.start > max(len(text) - 4, HEAD // 2)
    return True


def decoded(line: bytes, number: int) -> str:
    """The text of a line; ValueError if it is not UTF-8."""
    if number == 1:
        line = line.removeprefix(BYTE_ORDER_MARK)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        fault = f"not UTF-8 (byte 0x{line[error.start]:02x} at byte offset {error.start} of the row)"
        raise ValueError(f"{fault}; save the file as UTF-8 or delete that row") from None
