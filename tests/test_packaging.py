"""The shape of the repository: what is tracked, what is pinned, who imports whom, how long things are."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = {"model", "dataset", "scripts", "tests"}
TOP_LEVEL = {
    "pyproject.toml",
    "README.md",
    "README_cn.md",
    "technical_report.md",
    "tokenizer.json",
    "tokenizer_config.json",
    "model",
    "scripts",
    "dataset",
    "weights",
    "tests",
    "LICENSE",
}
ENTRY_POINTS = ("scripts/train", "scripts/eval")
MAX_ENTRY_LINES, MAX_FILE_LINES, MAX_FUNCTION_LINES = 150, 500, 60


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def tracked() -> list[str]:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, check=True, capture_output=True, text=True).stdout

    try:
        if Path(git("rev-parse", "--show-toplevel").strip()).resolve() != ROOT:
            pytest.skip("not the root of a git checkout")
        files = git("ls-files", "-z").split("\0")[:-1]
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, or no git")
    return files or pytest.skip("git tracks nothing yet")


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for line in settings["tool"]["uv"]["constraint-dependencies"]:
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==(\d[A-Za-z0-9.!]*)", line)
        assert match, f"not of the form name==version: {line!r}"
        name, version = canonical(match[1]), match[2]
        assert name not in found, f"pinned twice: {name}"
        found[name] = version
    return found


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Dotted names a module may load; `from a import b` counts as both `a` and `a.b`."""
    package = module if is_package else module.rpartition(".")[0]
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [base])])
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"}:
                names.add(str(node.args[0].value))
    return names


def imports_of(path: Path) -> set[str]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    is_package = parts[-1] == "__init__"
    module = ".".join(parts[:-1] if is_package else parts)
    return imports(path.read_text(encoding="utf-8"), module, is_package)


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def offences(folders: tuple[str, ...], forbidden) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(*folders)
        for name in sorted(imports_of(path))
        if forbidden(name)
    ]


def line_count(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_tracked_top_level_entries():
    top = {name.split("/")[0] for name in tracked()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_lock_is_not_tracked():
    assert "uv.lock" not in tracked()


def test_direct_dependencies_are_pinned():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    direct = settings["project"]["dependencies"] + settings["dependency-groups"]["dev"]
    assert {canonical(re.match(r"[A-Za-z0-9._-]+", line)[0]) for line in direct} <= pins().keys()


def test_locked_packages_are_pinned():
    lock = ROOT / "uv.lock"
    if not lock.exists():
        pytest.skip("no uv.lock: pytest was started without uv")
    pinned = pins()
    packages = tomllib.loads(lock.read_text(encoding="utf-8"))["package"]
    locked = [package for package in packages if package["source"] != {"virtual": "."}]
    assert len(locked) == len(packages) - 1 > 0
    loose = [
        f"{package['name']}=={package['version']}"
        for package in locked
        if pinned.get(canonical(package["name"])) != package["version"].partition("+")[0]
    ]
    assert not loose


def test_import_reader_sees_every_form():
    source = "import a.b\nfrom .c import d\nfrom .. import e\nfrom f import g\nimport_module('h.i')\n"
    expected = {"a.b", "p.q.c", "p.q.c.d", "p", "p.e", "f", "f.g", "h.i"}
    assert imports(source, "p.q.r") == expected
    assert imports(source, "p.q", is_package=True) == expected


def test_model_imports_only_itself_and_torch():
    """And safetensors, the format in which others keep weights."""
    allowed = sys.stdlib_module_names | {"model", "torch", "safetensors"}
    assert not offences(("model",), lambda name: name.split(".")[0] not in allowed)


def test_dataset_imports_no_model_and_no_scripts():
    """But for its one command, which has the command line and the result files of all others."""
    found = offences(("dataset",), lambda name: inside(name, "model", "scripts", "tests"))
    allowed = [f"dataset/check.py imports scripts.engine.{name}" for name in ("cli", "files")]
    assert [line for line in found if not inside(line, *allowed)] == []


def test_engine_imports_no_entry_point():
    assert not offences(("scripts/engine",), lambda name: inside(name, "scripts.train", "scripts.eval", "tests"))


def test_entry_points_do_not_import_each_other():
    assert not offences(ENTRY_POINTS, lambda name: inside(name, "scripts.train", "scripts.eval", "tests"))


def test_entry_points_are_short():
    assert not [str(path) for path in sources(*ENTRY_POINTS) if line_count(path) > MAX_ENTRY_LINES]


def test_files_are_short():
    assert not [str(path) for path in sources(*sorted(PROJECT)) if line_count(path) > MAX_FILE_LINES]


def test_functions_are_short():
    long = []
    for path in sources("model", "dataset", "scripts"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} is {lines} lines")
    assert not long
