"""The commands of README.md, taken from its text, in its order, each run to its end in a tiny form."""

import importlib
import io
import operator
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from dataset.rows import formats
from model import forward_process, masked_diffusion
from model.decoding import remasking
from scripts import quickstart
from scripts.engine.cli import run
from scripts.engine.experiments import runs as experiment_runs
from tests.scripts.commands import module_of
from tests.scripts.conftest import write_rows
from tests.scripts.experiments.test_experiments import in_process
from tests.soak import __main__ as soak

ROOT = Path(__file__).parents[2]
# What makes a documented command tiny; a command gets those of its module, behind its own flags.
SHAPE = "--hidden-size 32 --num-hidden-layers 1 --num-attention-heads 2"
TINY = {
    "scripts.train.train_pretrain": f"{SHAPE} --dtype float32 --batch-size 4 --log-interval 1",
    "scripts.train.diffusion": "--dtype float32",
    "scripts.train.train_tokenizer": "--target-vocab-size 300",
    "scripts.eval.schedule_variance": "--batch-size 2 --num-draws 2 --dtype float32",
    "scripts.eval.likelihood": "--dtype float32",
    "scripts.train.train_sft_minimind": "--dtype float32 --batch-size 4 --max-seq-len 96 --log-interval 1",
    "scripts.train.train_sft_diffusion": "--dtype float32 --batch-size 4 --max-seq-len 96 --log-interval 1",
    "scripts.train.train_dpo_minimind": "--dtype float32 --batch-size 4 --max-seq-len 96 --log-interval 1",
    "scripts.train.train_dpo_diffusion": (
        "--dtype float32 --batch-size 4 --max-seq-len 96 --log-interval 1 --dpo-num-masks 1"
    ),
    "scripts.eval.eval_sft_one_prompt": "--dtype float32 --gen-steps 4 --max-new-tokens 16",
    "scripts.eval.eval_sft": "--dtype float32 --max-new-tokens 32 --prompts-per-language 2 --steps 2,4",
    "scripts.eval.report": "--dtype float32 --eval-batch-size 8",
    "scripts.eval.experiments": (
        "--experiments initialisation --initialisation-tokens 256 --initialisation-shares 0 --heldout-tokens 150 "
        f"--nmc 2 --tokenizer-dir . {SHAPE} --max-seq-len 32 --batch-size 4 --val-fraction 0.3 --dtype float32"
    ),
    "scripts.eval.benchmark": (
        f"{SHAPE} --rounds 1 --batch-size 2 --kinds ar --parts scaling --scaling-lengths 16 --scaling-batches 2 "
        "--scaling-millions 1"
    ),
    "scripts.eval.soak": "--parts bytes",
    "scripts.quickstart": "--scale 0.001 --dtype float32",
    "scripts.chat": "--dtype float32 --gen-steps 4 --max-new-tokens 16",
}
TYPED = "你好\n/steps 2\nHow are you?\n/quit\n"  # into the chat
TRAIN_DIFFUSION = "--max-iters 3 --batch-size 4 --log-interval 1 --max-new-tokens 8"


def commands(path: Path) -> list[list[str]]:
    return commands_of(path.read_text(encoding="utf-8"))


def commands_of(text: str) -> list[list[str]]:
    """argv of every `uv run python -m MODULE ...` in bash blocks, continuation lines joined, and of every command in a
    table, whose abbreviations (`C`, `AB`) are explained before it."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    in_blocks = [shlex.split(line)[4:] for line in lines if line.startswith("uv run python -m ")]
    short = dict(re.findall(r"`(C|AB)`[^`|]*`(--[^`]+)`", text))
    rows = re.findall(r"^\|[^|]+\| `((?:scripts|dataset)\.[^`]+)` \|$", text, flags=re.MULTILINE)
    in_table = [re.sub(r"\b(C|AB)\b(?= |$)", lambda name: short[name[1]], row, count=1) for row in rows]
    return in_blocks + [shlex.split(row) for row in in_table]


def tiny(module: str, argv: list[str]) -> list[str]:
    if {"--from", "--draw"} & set(argv):  # drawn again: there is nothing to be made small
        return argv
    more = TINY.get(module, "")
    if "--streaming" in argv:
        more += " --max-iters 3"
    if module == "scripts.train.diffusion" and "--train" in argv:
        more += f" {TRAIN_DIFFUSION}" + ("" if "--init-from-minimind" in argv else f" {SHAPE}")
    return [*argv, *more.split()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder such as a user has after the README's set-up, with little data in it."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "dataset").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / name, folder)
    texts = [
        f"今天是第{i}天。Day {i} was as long as the {i + 1} days before it, and nobody said why." for i in range(40)
    ]
    messages = [({"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"第{i}天"}) for i in range(20)]
    rows = {
        "pretrain_hq": [{"text": text * 4} for text in texts],
        "sft_mini_512": [{"conversations": pair} for pair in messages],
        "dpo": [{"prompt": f"{i}?", "chosen": f"第{i}天", "rejected": "?"} for i in range(20)],
        "quiz": [{"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}],
    }
    for name, of_file in rows.items():
        write_rows(folder / "dataset" / f"{name}.jsonl", of_file)
    speech = "ROMEO:\nWhat light is this that breaks?\n\nJULIET:\nNone, sir; it is a test.\n\n"
    (folder / "dataset" / "tiny_shakespeare.txt").write_text(speech * 60, encoding="utf-8")
    return folder


def commands_in_full() -> list[list[str]]:
    """Those of the report's section "Commands in full"."""
    text = (ROOT / "technical_report.md").read_text(encoding="utf-8")
    return commands_of(re.search(r"^## \d+\. Commands in full$(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1])


def test_every_command_of_the_readme_and_the_report_runs_in_its_order(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(quickstart, "perform", lambda module, command: 0.0)  # its stages have tests of their own
    monkeypatch.setattr(quickstart, "summary", lambda folder, seconds: [])
    monkeypatch.setattr(quickstart, "seconds_of_a_step", lambda runtime: 1.0)
    monkeypatch.setitem(soak.PARTS, "bytes", lambda place, tries: [])
    monkeypatch.setattr(experiment_runs, "launch", in_process([]))
    documented = commands(ROOT / "README.md") + commands_in_full()
    assert len(documented) >= 37
    for module, *argv in documented:
        monkeypatch.setattr("sys.stdin", io.StringIO(TYPED))
        with pytest.raises(SystemExit) as ended:
            run(module_of(module).main, tiny(module, argv))
        output = capsys.readouterr()
        assert ended.value.code == 0, f"{module} {shlex.join(argv)}\n{output.err}"
        assert output.out.strip(), f"{module} {shlex.join(argv)} printed nothing"


def test_the_documented_stages_stand_in_the_readme_as_specified():
    """They are the project's public interface: changing one breaks somebody's notes."""
    text = re.sub(r"\s*\\\n\s*", " ", (ROOT / "README.md").read_text(encoding="utf-8"))
    for command in (
        "uv run python -m scripts.train.train_pretrain --data ./dataset/pretrain_hq.jsonl --jsonl-field text "
        "--tokenizer-dir . --run-name minimind_pretrain --hidden-size 512 --num-hidden-layers 8 "
        "--num-attention-heads 8 --max-seq-len 256 --epochs 1 --batch-size 96",
        "uv run python -m scripts.eval.eval_minimind --checkpoint weights/minimind_pretrain_state_dict.pt "
        '--tokenizer-dir . --prompt "请介绍你自己。" --max-new-tokens 200',
        "uv run python -m scripts.train.diffusion --train --use-tokenizer --data ./dataset/pretrain_hq.jsonl "
        "--inference-rope-scaling --learning-rate 4e-4 --warmup-steps 2000 --min-lr-ratio 0.025 "
        "--mask-schedule iid_t --repeat-penalty-weight 0 "
        "--init-from-minimind weights/minimind_pretrain_state_dict.pt --run-name diffusion_from_ar_eq3 "
        "--early-stop-patience 5 --early-stop-min-delta 0.001 --max-iters 40000 --batch-size 96",
        "uv run python -m scripts.eval.eval_diffusion --checkpoint weights/diffusion_from_ar_eq3.pt --tokenizer-dir . "
        '--seq-len 256 --prompt "请介绍你自己。" --max-new-tokens 200',
        "uv run python -m scripts.train.train_sft_minimind --data dataset/sft_mini_512.jsonl --tokenizer-dir . "
        "--load-from weights/minimind_pretrain_state_dict.pt --run-name minimind_sft --max-seq-len 512 "
        "--batch-size 96 --epochs 2",
        "uv run python -m scripts.train.train_sft_diffusion --data dataset/sft_mini_512.jsonl --tokenizer-dir . "
        "--load-from weights/diffusion_from_ar_eq3.pt --run-name diffusion_sft --max-seq-len 512 "
        "--batch-size 96 --epochs 3",
        'uv run python -m scripts.eval.eval_sft_one_prompt --prompt "你好,请介绍你自己。" --tokenizer-dir . '
        "--minimind-checkpoint weights/minimind_sft_state_dict.pt "
        "--diffusion-checkpoint weights/diffusion_sft_state_dict.pt --seq-len 512 --max-new-tokens 128",
    ):
        assert command in text


def test_the_readme_names_every_runnable_module_and_no_other():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = {module for module, *_ in commands(ROOT / "README.md")}
    runnable = {
        f"scripts.{folder}.{path.stem}"
        for folder in ("train", "eval")
        for path in (ROOT / "scripts" / folder).glob("[a-z]*.py")
    } | {f"scripts.{path.stem}" for path in (ROOT / "scripts").glob("[a-z]*.py")}
    runnable = runnable - {"scripts.check_data"} | {"dataset.check"}  # the command and its module
    assert named == runnable
    for line in re.findall(r"^  .*\.py.*$", text, flags=re.MULTILINE):  # the map of the tree names real files
        for name in re.findall(r"[a-z_]+\.py", line):
            assert any(list((ROOT / top).rglob(name)) for top in ("model", "dataset", "scripts", "tests")), name


def test_the_stops_of_the_walks_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    stops = re.findall(r"^\| `([\w.]+)` in `([\w/]+)\.py` \|", text, flags=re.MULTILINE)
    assert len(stops) == 16
    for name, path in stops:
        operator.attrgetter(name)(importlib.import_module(path.replace("/", ".")))


def python_blocks(path: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)


def test_both_readmes_have_the_same_commands_numbers_python_and_pictures():
    """README_cn.md is README.md in Chinese: the same commands, files and figures, in the same order."""
    english, chinese = ROOT / "README.md", ROOT / "README_cn.md"
    assert commands(english) == commands(chinese)
    numbers, names = (
        [re.findall(pattern, path.read_text(encoding="utf-8")) for path in (english, chinese)]
        for pattern in (r"\d+\.\d+", r"[\w/<>]+\.(?:pt|png|jsonl|py)\b")
    )
    assert sorted(numbers[0]) == sorted(numbers[1])
    assert sorted(names[0]) == sorted(names[1])
    assert python_blocks(english) == python_blocks(chinese) != []
    pictures = [re.findall(r"\]\((\S+\.png)\)", path.read_text(encoding="utf-8")) for path in (english, chinese)]
    assert pictures[0] == pictures[1] and all((ROOT / name).is_file() for name in pictures[0])


def test_the_lines_that_add_something_add_it(monkeypatch):
    """Each block of Python, put at the end of the file that it names."""
    for block in python_blocks(ROOT / "README.md"):
        module = importlib.import_module(re.match(r"# (\S+)\.py\n", block)[1].replace("/", "."))
        for name in ("MASK_SCHEDULES", "POLICIES", "FORMATS"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, dict(getattr(module, name)))
        exec(compile(block, module.__name__, "exec"), module.__dict__)
    tokens, maskable = torch.arange(20).view(2, 10), torch.ones(2, 10, dtype=torch.bool)
    noise, settings = forward_process.StepNoise(0, 0, 2), masked_diffusion.MaskedDiffusion()
    noised = forward_process.mask_tokens({"input_ids": tokens, "loss_mask": maskable}, 99, "half", noise, settings)
    assert 0 < noised.scored.sum() < 20 and noised.weight.unique().tolist() == [2.0]
    step = remasking.Step(
        *[torch.ones(1, 3)] * 1,
        torch.ones(1, 3, dtype=torch.bool),
        torch.zeros(1, 3, dtype=torch.bool),
        torch.tensor([1]),
        torch.tensor([3]),
        0.9,
        1.0,
        0.1,
        torch.zeros(3, 5),
        lambda: torch.rand(3),
    )
    assert remasking.choose("right_to_left", step).tolist() == [[False, False, True]]
    assert [turn["content"] for turn in formats.messages_of({"riddle": "2 + 2?", "answer": "4"})] == ["2 + 2?", "4"]
