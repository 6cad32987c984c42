"""Flags that have an effect only beside others, on a group of the test's own."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest

from dataset.corpus import bundled
from scripts.engine import cli
from scripts.engine.flags import Need, settings_of


@dataclass(frozen=True)
class Group:
    """A group."""

    size: Annotated[int, "a size", "at least 1"] = 3
    mode: Annotated[Literal["a", "b", "c"], "a mode", "--kind"] = "a"
    rate: Annotated[float, "a rate", "in (0, 1]", "with --mode b or c"] = 0.5
    names: Annotated[tuple[Literal["u", "v"], ...], "names", "with --size above 3"] = ("u",)
    fast: Annotated[bool, "fast", "without --kind b"] = False
    label: Annotated[str | None, "a label", "with --fast or --names v"] = None
    depth: Annotated[int, "a depth", "with a diffusion model", "without blocks"] = 0


def parse(*argv, **more):
    return cli.parse_args("what it does", Group, argv=list(argv), **more)


IDLE = [
    (["--rate", "0.1"], "--rate has no effect without --mode b or c"),
    (["--names", "v"], "--names has no effect without --size above 3"),
    (["--fast", "--mode", "b"], "--fast has no effect with --kind b"),
    (["--no-fast", "--mode", "b"], "--fast has no effect with --kind b"),
    (["--label", "x"], "--label has no effect without --fast or --names v"),
]


@pytest.mark.parametrize("argv, words", IDLE)
def test_a_flag_whose_need_is_not_met_is_refused(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2 and f"error: {words}; leave it out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv",
    [
        ["--rate", "0.1", "--mode", "c"],
        ["--size", "4", "--names", "v,u", "--label", "x"],
        ["--fast", "--mode", "c", "--label", ""],
        ["--depth", "1"],  # a fact, of which nothing is known yet
    ],
)
def test_a_flag_whose_needs_are_met_is_not(argv):
    parse(*argv)


@dataclass(frozen=True)
class Files:
    """Files."""

    data: Annotated[Path | None, "rows"] = None
    eval_data: Annotated[tuple[Path, ...] | None, "more rows"] = None
    out: Annotated[Path | None, "a place"] = None


def test_bundled_files_are_given_by_name_where_data_are(tmp_path, monkeypatch, capsys):
    made = {name: lambda: [{"text": "甲"}] for name in ("tasks", "task_questions")}
    monkeypatch.setattr(bundled, "TASK_FILES", made)
    monkeypatch.chdir(tmp_path)
    argv = ["--data", "own.jsonl, bundled:tasks", "--eval-data", "bundled:task_questions,x", "--out", "bundled:tasks"]
    files, _ = cli.parse_args("what it does", Files, argv=argv)
    own, tasks = str(files.data).split(",")
    assert own == "own.jsonl" and tasks == str(bundled.bundled_file("tasks"))
    assert Path(tasks).read_text(encoding="utf-8") == '{"text": "甲"}\n'
    assert files.eval_data == (bundled.bundled_file("task_questions"), Path("x"))
    assert files.out == Path("bundled:tasks")
    for flag in ("--data", "--eval-data"):
        with pytest.raises(SystemExit) as stop:
            cli.parse_args("what it does", Files, argv=[flag, "bundled:task"])
        said = capsys.readouterr().err
        assert stop.value.code == 2 and f"{flag}: bundled:task" in said and "pretrain, sft" in said and "tasks" in said


@pytest.mark.parametrize("names", ["u,w", "", "u,,v", "u,"])
def test_a_list_of_choices_holds_choices_alone(names, capsys):
    with pytest.raises(SystemExit):
        parse("--size", "4", "--names", names)
    assert "--names" in capsys.readouterr().err
    assert parse("--size", "4", "--names", "u, v")[0].names == ("u", "v")


def test_facts_are_told_by_the_command():
    *_, typed = parse("--depth", "1", "--size", "4")
    typed.refuse_without({"a diffusion model": True, "blocks": False})
    for facts in ({"a diffusion model": False}, {"blocks": True}):
        with pytest.raises(ValueError, match=f"--depth has no effect with.* {next(iter(facts))}; leave it out"):
            typed.refuse_without(facts)


def test_of_several_configs_one_is_enough():
    group, typed = parse("--rate", "0.1", "--label", "x", later=(Group,))
    typed.refuse_idle(group, replace(group, mode="b", fast=True))
    with pytest.raises(ValueError, match="--label has no effect"):
        typed.refuse_idle(group, replace(group, mode="b"))


def test_a_command_adds_needs_to_flags_and_to_groups(capsys):
    with pytest.raises(SystemExit):
        parse("--size", "4", "--fast", needs={"size": ("without --fast", "with --mode c")})
    assert "--size has no effect with --fast" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse("--size", "4", needs={Group: "with --mode c"})
    assert "--size has no effect without --mode c" in capsys.readouterr().err
    for needs in ({"nonsense": "with --fast"}, {"size": "with --nonsense"}, {"size": "where it is fast"}):
        with pytest.raises(TypeError):
            parse(needs=needs)


@pytest.mark.parametrize("text", ["", "with", "if --fast", "with ", "with --size above x"])
def test_what_is_no_need_is_a_fault_of_the_program(text):
    with pytest.raises(TypeError):
        Need(text)


def test_help_shows_ranges_and_needs(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "a rate; in (0, 1]; with --mode b or c [0.5]" in text and "--names {u,v},... names" in text


def test_settings_are_plain_values():
    @dataclass(frozen=True)
    class Files:
        """Files."""

        files: Annotated[tuple[Path, ...], "files"] = (Path("a"), Path("b"))
        out: Annotated[Path, "folder"] = Path("c")
        hidden: int = 3

    assert settings_of(Files(), Group())["files"] == ("a", "b")
    assert settings_of(Files()) == {"files": ("a", "b"), "out": "c"}
