"""The repository: what is tracked, what is pinned, and who imports whom."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.conftest import SLOW

ROOT = Path(__file__).resolve().parents[1]
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
# The rooms of the house from the ground up. A module imports from its own room and from lower floors;
# rooms of one floor do not know each other.
FLOORS = (
    ("model", "dataset"),
    ("model.decoding",),
    ("scripts.engine",),
    ("scripts.engine.training",),
    ("scripts.engine.likelihood",),
    ("scripts.engine.decoding",),
    ("scripts.engine.report",),
    ("scripts.engine.bench", "scripts.engine.experiments"),
    ("scripts.train", "scripts.eval", "scripts.chat", "scripts.quickstart", "scripts.check_data"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Commands whose module is elsewhere, and which therefore run it by name.
DOORS = {"dataset/check.py": "scripts.check_data", "scripts/eval/soak.py": "tests.soak"}


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
    versions: dict[str, str] = {}
    for line in settings["tool"]["uv"]["constraint-dependencies"]:
        match = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)==(\d[A-Za-z0-9.!]*)", line)
        assert match, f"not of the form name==version: {line!r}"
        name, version = canonical(match[1]), match[2]
        assert name not in versions, f"pinned twice: {name}"
        versions[name] = version
    return versions


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


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    return imports(path.read_text(encoding="utf-8"), module_of(path), path.name == "__init__.py")


def import_graph() -> dict[str, set[str]]:
    """The modules of the project that each of them imports, also inside functions and by name."""
    paths = {module_of(path): path for path in sources("model", "dataset", "scripts") if path.name != "__init__.py"}
    return {module: imports_of(path) & paths.keys() - {module} for module, path in paths.items()}


def room_of(module: str) -> str:
    """The innermost room that holds a module."""
    return max((room for room in FLOOR if inside(module, room)), key=len)


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def offences(folders: tuple[str, ...], forbidden) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(*folders)
        for name in sorted(imports_of(path))
        if forbidden(name)
    ]


def test_tracked_top_level_entries():
    top = {name.split("/")[0] for name in tracked()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL


def test_lock_is_not_tracked():
    assert "uv.lock" not in tracked()


def test_direct_dependencies_are_pinned():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = [settings["project"]["dependencies"], *settings["project"]["optional-dependencies"].values()]
    direct = [line for group in (*groups, settings["dependency-groups"]["dev"]) for line in group]
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


def test_imports_go_down_the_floors():
    upward = {
        f"{module} imports {name}"
        for module, names in import_graph().items()
        for name in names
        if room_of(name) != room_of(module) and FLOOR[room_of(name)] >= FLOOR[room_of(module)]
    }
    assert not upward


def circular(graph: dict[str, set[str]]) -> set[str]:
    """The modules on circles of imports and between two of them: what remains when ends are taken off both ways."""
    while True:
        imported = set().union(*graph.values())
        kept = {module for module, names in graph.items() if names and module in imported}
        if kept == graph.keys():
            return kept
        graph = {module: graph[module] & kept for module in kept}


def test_imports_run_in_no_circle():
    assert circular({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == {"b", "c"}
    assert not circular(import_graph())


def test_nothing_imports_the_tests():
    assert not offences(("model", "dataset", "scripts"), lambda name: inside(name, "tests"))


def test_modules_are_run_by_name_only_by_the_two_doors_and_the_quickstart():
    """An import that no reader of the source can see: `runpy`, or `import_module` of a variable."""
    doors = {
        path.relative_to(ROOT).as_posix()
        for path in sources("model", "dataset", "scripts")
        if "runpy" in imports_of(path)
    }
    assert doors == DOORS.keys()
    for door, module in DOORS.items():
        assert f'runpy.run_module("{module}", run_name="__main__", alter_sys=True)' in (ROOT / door).read_text()
    by_name = [
        path.name
        for path in sources("model", "dataset", "scripts")
        if re.search(r"import_module\((?![\"'])", path.read_text())
    ]
    assert by_name == ["quickstart.py"]


def test_the_slow_files_exist():
    assert set(SLOW) <= {path.name for path in sources("tests")}


def test_entry_points_do_not_import_each_other():
    entries = ("scripts.train", "scripts.eval", "scripts.chat", "scripts.quickstart", "scripts.check_data")
    assert not offences(("scripts/train", "scripts/eval"), lambda name: inside(name, *entries, "tests"))
