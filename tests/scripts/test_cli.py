"""The command line as an interface: flags, aliases, help, and commands that run as they are written."""

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch

from model.checkpoint import load_checkpoint
from model.masked_diffusion import MaskedDiffusion
from scripts.engine import cli
from scripts.engine.training.run import REPORTED, SILENT, RunConfig
from scripts.eval import eval_minimind
from scripts.train import diffusion, train_pretrain
from tests.scripts.commands import COMMANDS, EVALS, module_of

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Group:
    """A group."""

    some_number: Annotated[int, "a number, 5 % of it", "--number", "--n", "at least 0"] = 3
    some_text: Annotated[str | None, "a text"] = None
    some_rate: Annotated[float, "a rate"] = 0.5
    some_flag: Annotated[bool, "a flag"] = False
    kind: Annotated[Literal["a", "b"], "a choice"] = "a"
    hidden: int = 7


def parse(*argv):
    return cli.parse_args("what it does", Group, argv=list(argv))


def test_defaults_and_what_was_typed():
    assert parse() == (Group(), frozenset())
    assert parse("--n", "4", "--some-flag") == (Group(some_number=4, some_flag=True), {"some_number", "some_flag"})
    assert parse("--some-number", "3")[1] == {"some_number"}  # typed, although it is the default
    assert parse("--no-some-flag") == (Group(), {"some_flag"})


def test_a_command_may_change_a_default_but_not_invent_a_field():
    group, given = cli.parse_args("d", Group, argv=[], some_number=9)
    assert group.some_number == 9 and not given
    with pytest.raises(TypeError, match="nonsense"):
        cli.parse_args("d", Group, argv=[], nonsense=9)


@pytest.mark.parametrize(
    "spelling", [["--some_number", "5"], ["--some_number=5"], ["--some-number=5"], ["--number", "5"]]
)
def test_underscores_and_aliases_are_the_flag(spelling):
    assert parse(*spelling)[0].some_number == 5


@pytest.mark.parametrize("text", ["a_b", "snake_case and --more_of_it", "--some_thing else", "a=b_c", "你好_", ""])
def test_values_are_kept_as_they_are(text):
    """A prompt is a value: its underscores are its own, wherever it begins with two hyphens, too."""
    assert parse("--some-text", text)[0].some_text == text
    assert parse(f"--some_text={text}")[0].some_text == text


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--nonsense"], "--nonsense"),
        (["--some-numb", "3"], "--some-numb"),
        (["--some-number", "three"], "three"),
        (["--some-number", "3.5"], "3.5"),
        (["--some-number"], "--some-number"),
        (["--some-rate=much"], "much"),
        (["--some-rate=nan"], "nan"),
        (["--some-rate=-inf"], "-inf"),
        (["--kind", "c"], "'a', 'b'"),
        (["--some-number", "-4"], "--some-number must be at least 0, not -4"),
        (["--hidden", "8"], "--hidden"),
        (["stray"], "stray"),
        (["--some-flag=yes"], "--some-flag"),
    ],
)
def test_wrong_arguments_end_in_one_sentence_and_exit_2(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and words in error
    assert "_" not in error, "in words of the user, not of our functions"


MEANT = [
    ("--some-numbr", "--some-number"),
    ("--somenumber", "--some-number"),
    ("-some-text", "--some-text"),
    ("\u2013some-text", "--some-text"),  # as printed documents have it
    ("--text", "--some-text"),
    ("--some", ""),  # one of four
    ("--some-other-number", ""),
    ("--king-size", ""),
    ("--seed", ""),
]


@pytest.mark.parametrize("typed, near", MEANT)
def test_advice_on_an_unknown_flag_is_a_slip_or_longer_name_of_it_or_absent(typed, near, capsys):
    with pytest.raises(SystemExit):
        parse(typed, "1")
    error = capsys.readouterr().err
    assert (f"did you mean {near}? " in error) if near else ("did you mean" not in error)


def test_files_that_a_shell_made_of_a_pattern_are_recognised(tmp_path, capsys):
    (tmp_path / "b.jsonl").touch()
    for name, advised in ((tmp_path / "b.jsonl", True), (tmp_path / "c.jsonl", False)):
        with pytest.raises(SystemExit):
            parse("--some-text", "a.jsonl", str(name))
        assert ("between quotes" in capsys.readouterr().err) == advised


def test_help_shows_help_text_default_and_aliases(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for part in ("what it does", "--number", "--n", "a number, 5 % of it; at least 0 [3]", "a text [none]", "{a,b}"):
        assert part in re.sub(r"\s+", " ", text), part
    assert "hidden" not in text


@pytest.mark.parametrize(
    "error, code, said",
    [
        (ValueError("two\nlines"), 2, "error: two lines\n"),
        (FileNotFoundError("no x"), 2, "error: no x\n"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(143), 143, ""),
        (None, 0, ""),
    ],
)
def test_how_a_command_ends(error, code, said, capsys):
    def main(argv):
        if error is not None:
            raise error

    with pytest.raises(SystemExit) as stop:
        cli.run(main, [])
    assert stop.value.code == code and capsys.readouterr().err == said


def test_our_own_faults_are_not_dressed_as_the_users():
    def main(argv):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        cli.run(main, [])


# -- the real commands -------------------------------------------------------------------------------------------------


def documented(module: str) -> list[list[str]]:
    """The arguments of every command for `module` in its own docstring."""
    text = module_of(module).__doc__.replace("\\\n", " ")
    commands = re.findall(rf"^ *(?:uv run )?python -m {re.escape(module)}\b(.*)$", text, re.MULTILINE)
    return [shlex.split(arguments) for arguments in commands]


@pytest.mark.parametrize("module", COMMANDS)
def test_help_works_and_contains_the_command_itself(module, command):
    result = command(module_of(module), ["--help"])
    assert (result.code, result.err) == (0, "")
    assert f"python -m {module}" in result.out


@pytest.mark.parametrize(
    "module", [name for name in COMMANDS if name not in ("scripts.eval.soak", "scripts.quickstart")]
)  # it makes its own
def test_the_commands_in_a_docstring_parse_and_fail_for_want_of_their_files_only(
    module, command, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    commands = documented(module)
    assert commands, f"{module}: no command in its docstring"
    for argv in commands:
        result = command(module_of(module), argv)
        assert result.code == 2 and "--help lists the flags" not in result.err, result.err
        assert re.search(r"does not exist|there is no|holds no", result.err), result.err


def test_a_command_in_a_process_of_its_own_reports_a_mistake_without_a_traceback(workspace):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    line = [sys.executable, "-m", "scripts.eval.likelihood", "--checkpoint", "没有.pt", "--eval-data", "x.jsonl"]
    result = subprocess.run(line, cwd=workspace, env=environment, capture_output=True)
    assert result.returncode == 2 and result.stdout == b""
    assert result.stderr.decode("utf-8").startswith("error: ") and result.stderr.count(b"\n") == 1


def test_settings_that_may_change_are_settings():
    """A renamed field would make its name in these lists a dead letter."""
    from dataset.pretrain import PretrainData
    from model.preference import Preference
    from scripts.engine.runtime import RuntimeConfig
    from scripts.engine.training.config import TrainerConfig

    known = {
        f.name for group in (RunConfig, TrainerConfig, RuntimeConfig, PretrainData, Preference) for f in fields(group)
    }
    assert known >= SILENT | REPORTED and not SILENT & REPORTED


@pytest.mark.parametrize(
    "module, typed, near",
    [
        ("scripts.train.train_pretrain", "--block-size", None),  # not --batch-size
        ("scripts.train.train_pretrain", "--mask-schedule", None),  # not --lr-schedule
        ("scripts.train.train_pretrain", "--wsd-stable-ratio", None),  # not --lr-stable-ratio
        ("scripts.eval.eval_diffusion", "--lr", None),  # not --help
        ("scripts.eval.eval_diffusion", "--temperature", "--gen-temp"),  # not --trace
        ("scripts.eval.eval_diffusion", "--max-length", "--max-seq-len"),
        ("scripts.chat", "--top-k", "--ar-top-k or --gen-top-k"),
        ("scripts.eval.report", "--checkpoint", "--diffusion-checkpoint or --minimind-checkpoint"),
        ("scripts.train.train_sft_diffusion", "--steps", None),  # one of many
    ],
)
def test_advice_does_not_lead_to_a_flag_that_does_something_else(module, typed, near, command):
    error = command(module_of(module), [typed, "1"]).err
    assert f"(did you mean {near}? " in error if near else "(--help lists" in error


# -- generation through the commands -----------------------------------------------------------------------------------


@pytest.fixture
def trained(prompting):
    """(module, argv) of both evaluation commands with a checkpoint of their kind."""
    few = ["--max-new-tokens", "5", "--dtype", "float32"]
    return [(EVALS[name], [*prompting[name], *few]) for name in ("eval_minimind", "eval_diffusion")]


@pytest.mark.parametrize(
    "prompt", ["", "🙂👨‍👩‍👧", "a\x00b", "<|im_start|>user<|im_end|><|mask|>", "  \n\t", "你好_ --x_y", "'\"\\"]
)
def test_every_prompt_comes_back_as_it_was_given(prompt, trained, command):
    for module, argv in trained:
        result = command(module, [*argv, f"--prompt={prompt}", "--json"])
        assert result.code == 0, result.err
        generation = json.loads(result.out)["generation"]
        assert generation["prompt"] == prompt and 1 <= generation["num_tokens"] <= 5
        assert "<|mask|>" not in generation["text"]


def test_generation_repeats_with_its_seed_which_is_that_of_the_command_unless_it_has_its_own(trained, command):
    for module, argv in trained:
        name = "ar-temperature" if module is eval_minimind else "gen-temp"
        argv = [*argv, "--prompt", "the", f"--{name}", "5", f"--{name.partition('-')[0]}-top-k", "0"]

        def text(*seed, module=module, argv=argv):
            return command(module, [*argv, *seed]).out.splitlines()[0]

        assert text("--gen-seed", "2") == text("--gen-seed", "2") == text("--seed", "2")
        assert text("--gen-seed", "2") == text("--seed", "1", "--gen-seed", "2") != text("--seed", "1")


def test_a_trained_model_is_the_same_whatever_is_generated_afterwards(command, diffusion_argv):
    assert command(diffusion, diffusion_argv).code == 0
    before = load_checkpoint(Path("weights/dm_state_dict.pt"))["weights"]
    assert command(diffusion, [*diffusion_argv, "--overwrite", "--prompt", "the", "--gen-temp", "3"]).code == 0
    after = load_checkpoint(Path("weights/dm_state_dict.pt"))["weights"]
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_the_loss_curve_is_drawn(command, pretrain_argv, plots):
    assert command(train_pretrain, pretrain_argv).code == 0
    assert Path("weights/ar_loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in Path("weights").iterdir()) == [
        *("ar.pt", "ar_best.pt", "ar_log.jsonl", "ar_loss.png", "ar_state_dict.pt")
    ]


@pytest.mark.parametrize(
    "flags, cap, block, kept",
    [
        ("--llada2-enable-cap", 1.0, None, 0),
        ("--llada2-cap-lambda 2 --llada2_enable_cap", 2.0, None, 0),
        ("--llada2-enable-block-diffusion --llada2-topk-merge", 0.0, 32, 3),
        (
            "--llada2-block-size 16 --llada2-enable-block-diffusion --llada2-topk-merge --llada2-topk-merge-k 5",
            0.0,
            16,
            5,
        ),
    ],
)
def test_a_switch_stands_for_a_value_and_gives_way_to_a_typed_one(flags, cap, block, kept):
    objective, run, given = cli.parse_args("", MaskedDiffusion, RunConfig, argv=flags.split())
    assert (objective.cap_weight, objective.block_size, run.topk_merge) == (cap, block, kept)
    assert given == {n for n, v in (("cap_weight", cap), ("block_size", block), ("topk_merge", kept)) if v}


def test_a_list_is_numbers_with_commas():
    objective, _ = cli.parse_args(
        "",
        MaskedDiffusion,
        argv=["--use-block-curriculum", "--wsd-block-sizes-up", "1,2,8", "--wsd_phase_ratios=0.5,0.25,0.25"],
    )
    assert objective.wsd_block_sizes_up == (1, 2, 8) and objective.wsd_phase_ratios == (0.5, 0.25, 0.25)
