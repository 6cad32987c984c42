"""The house stays small enough to be read: lines of files and functions, arguments with names, comments."""

import ast
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.test_packaging import ROOT, sources

SOURCE = ("model", "dataset", "scripts")
FILE, STAGE_SCRIPT, FUNCTION = 400, 150, 60  # lines
MODULES = {"model": 18}  # in a folder, __init__ not counted; elsewhere 15
PARAMETERS = 6  # self not counted; the network's own interface has more
COMMENTS = 0.08  # for each line of code, in model/


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def line_count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def nodes(*folders: str) -> Iterator[tuple[str, ast.AST]]:
    """(file:line, node) of everything that has a place in a source file."""
    for path in sources(*folders):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if hasattr(node, "lineno"):
                yield f"{name_of(path)}:{node.lineno}", node


def functions(*folders: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for place, node in nodes(*folders):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{place} {node.name}", node


def test_files_are_short():
    assert not [name_of(path) for path in sources(*SOURCE) if line_count(path) > FILE]
    assert not [name_of(path) for path in sources("scripts/train", "scripts/eval") if line_count(path) > STAGE_SCRIPT]


def test_functions_are_short():
    assert not [place for place, node in functions(*SOURCE) if node.end_lineno - node.lineno + 1 > FUNCTION]


def test_folders_are_small():
    folders = Counter(path.parent for path in sources(*SOURCE) if path.name != "__init__.py")
    assert not [name_of(folder) for folder, count in folders.items() if count > MODULES.get(name_of(folder), 15)]


def test_functions_take_few_parameters():
    many = []
    for place, node in functions(*SOURCE):
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        if len(names) - (names[:1] in (["self"], ["cls"])) > PARAMETERS:
            many.append(place.partition(":")[0] + " " + node.name)
    assert many == ["model/transformer.py forward"]


def test_no_anonymous_arguments_are_passed_on():
    """`*more` and `**more`: a reader cannot see which argument is which."""
    anonymous = [
        place
        for place, node in functions(*SOURCE)
        if any(a and a.arg == "more" for a in (node.args.vararg, node.args.kwarg))
    ]
    for place, node in nodes(*SOURCE):
        if isinstance(node, ast.Call):
            values = [argument.value for argument in node.args if isinstance(argument, ast.Starred)]
            values += [keyword.value for keyword in node.keywords if keyword.arg is None]
            anonymous += [place for value in values if isinstance(value, ast.Name) and value.id == "more"]
    assert not anonymous


def test_durations_come_from_a_clock_that_cannot_be_set():
    """`time.time()` goes backwards when somebody sets the clock; nothing may depend on it."""
    assert not [
        place
        for place, node in nodes(*SOURCE)
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("time.time", "time.time_ns", "datetime.now")
    ]


def test_the_mathematics_is_commented():
    """Comments for each line of code (neither blank, comment nor docstring) of model/."""
    comments = code = 0
    for path in sources("model"):
        with path.open("rb") as file:
            tokens = list(tokenize.tokenize(file.readline))
        comments += sum(token.type == tokenize.COMMENT for token in tokens)
        docstrings = {
            number
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            for number in range(node.lineno, node.end_lineno + 1)
        }
        layout = (tokenize.ENCODING, tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
        lines = {token.start[0] for token in tokens if token.type not in (*layout, tokenize.ENDMARKER)}
        code += len(lines - docstrings)
    assert comments >= COMMENTS * code, f"{comments} comments, {code} lines of code"
