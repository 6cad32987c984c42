"""--dry-run and --show-batch: what they say is what the run will do, and they write nothing."""

import io
import re
from pathlib import Path

import pytest
import torch

from model import masked_diffusion
from model.checkpoint import load_checkpoint
from model.forward_process import mask_tokens
from scripts.engine.training.preview import _counted
from scripts.train import diffusion, train_pretrain, train_sft_minimind
from tests.scripts.commands import TRAINS
from tests.scripts.conftest import snapshot, write_jsonl, write_rows
from tests.scripts.models import Terminal


@pytest.mark.parametrize("flag", ["--dry-run", "--show-batch"])
@pytest.mark.parametrize("name", TRAINS)
def test_a_preview_writes_nothing(name, flag, command, train_argv, workspace):
    before = snapshot(workspace)
    result = command(TRAINS[name], [*train_argv[name], flag])
    assert result.code == 0 and "12 steps" in result.out
    assert snapshot(workspace) == before


def test_a_dry_run_counts_what_the_run_will_have(command, pretrain_argv):
    said = command(train_pretrain, [*pretrain_argv, "--dry-run", "--accumulation-steps", "3"]).out
    assert command(train_pretrain, [*pretrain_argv, "--accumulation-steps", "3"]).code == 0
    weights = load_checkpoint(Path("weights/ar_state_dict.pt"))["weights"]
    assert f"parameters {sum(t.numel() for t in weights.values()):,};" in said
    for name, tensor in weights.items():
        if not name.startswith("layers.1."):
            assert re.search(rf"{re.escape(name)} +{re.escape(str(tuple(tensor.shape)))}", said), name


def test_a_dry_run_counts_once_what_a_forward_pass_keeps_and_no_parameters():
    layer, x = torch.nn.Linear(8, 5, bias=False), torch.randn(30, 8, requires_grad=True)
    with _counted(layer) as sizes:
        one, two = layer(x).exp(), layer(x).exp()
    assert sum(sizes.values()) == x.nbytes + one.nbytes + two.nbytes
    (one + two).sum().backward()
    torch.testing.assert_close(x.grad, 2 * one.detach() @ layer.weight.detach())


@pytest.fixture
def terminal(monkeypatch):
    """stdout is one, as far as the commands can see."""
    monkeypatch.setattr(io, "StringIO", Terminal)


SHOW = ["--show-batch", "--no-packing", "--max-seq-len", "128"]


def shown_rows(said: str, texts: list[str]) -> list[tuple[int, int, str]]:
    """(masked, maskable, text with its marks) of each row."""
    rows = re.findall(r"row (\d+): (\d+) masked of (\d+) maskable\n(.*)\n", said)
    assert len(rows) == len({row[3] for row in rows}) == 4
    assert all(1 <= int(masked) <= int(maskable) <= 128 for _, masked, maskable, _ in rows)
    return [(int(masked), int(maskable), text) for _, masked, maskable, text in rows]


def test_a_batch_on_a_terminal_is_shown_in_colour_and_in_full(command, diffusion_argv, texts, terminal):
    """Without its colours and boundaries, a shown row is a document of the corpus and padding."""
    said = command(diffusion, [*diffusion_argv, *SHOW]).out
    for masked, maskable, text in shown_rows(said, texts):
        pieces = re.findall(r"\033\[(4[124]|100)m(.*?)\033\[0m", text)
        colours = [colour for colour, _ in pieces]
        assert (colours.count("41"), colours.count("41") + colours.count("42")) == (masked, maskable)
        assert len(pieces) == 128 and colours.count("100") == 128 - maskable
        if not re.search("[^\x00-\x7f]", text):  # the bytes of one Chinese character may be several tokens
            plain = "".join(piece for colour, piece in pieces if colour != "100")
            assert plain.removeprefix("<|im_start|>").removesuffix("<|im_end|>") in texts


def test_a_batch_in_a_file_or_a_pipe_is_shown_with_marks_and_without_colours(command, diffusion_argv, texts):
    said = command(diffusion, [*diffusion_argv, *SHOW]).out
    assert "\033" not in said
    assert re.search(r"^\[masked\]  scored  \(context\)  \.padding  \| document boundary$", said, re.MULTILINE)
    for masked, maskable, text in shown_rows(said, texts):
        assert text.count("[") == text.count("]") == masked  # the corpus has neither
        real, _, padding = text.partition("|.")
        assert padding.count("<|endoftext|>") == 128 - maskable
        if real.isascii():
            plain = re.sub(r"[\[\]]", "", real)
            assert plain.removeprefix("<|im_start|>").removesuffix("<|im_end|>") in texts


def test_a_dry_run_times_a_whole_batch_of_a_smaller_corpus(command, pretrain_argv, monkeypatch, workspace, texts):
    """Training fills a batch from the next pass over the rows; the estimate must, too."""
    sizes = []

    class Spy(train_pretrain.NextToken):
        def loss(self, model, prepared):
            sizes.append(len(prepared["input_ids"]))
            return super().loss(model, prepared)

    monkeypatch.setattr(train_pretrain, "NextToken", Spy)
    write_jsonl(workspace / "few.jsonl", texts[:2])
    assert command(train_pretrain, [*pretrain_argv, "--data", "few.jsonl", "--batch-size", "9", "--dry-run"]).code == 0
    assert set(sizes) == {9}


def test_a_shown_batch_is_masked_as_the_first_step_masks_it(command, diffusion_argv, monkeypatch):
    argv = [*diffusion_argv, "--batch-size", "8", "--accumulation-steps", "2", "--variable-length-prob", "0"]
    argv += ["--no-packing", "--max-iters", "1"]
    shown = re.findall(r": (\d+) masked of (\d+) maskable", command(diffusion, [*argv, "--show-batch"]).out)
    first = []

    def spy(batch, *settings):
        noised = mask_tokens(batch, *settings)
        first.extend(zip(noised.scored.sum(dim=1).tolist(), batch["loss_mask"].sum(dim=1).tolist(), strict=True))
        return noised

    monkeypatch.setattr(masked_diffusion, "mask_tokens", spy)
    assert command(diffusion, argv).code == 0
    assert [(int(a), int(b)) for a, b in shown] == first[:4]


def test_a_batch_of_conversations_shows_their_context_and_what_is_learnt(command, sft_argv):
    turns = [
        ("system", "the river"),
        ("user", "the cat"),
        ("assistant", "sees"),
        ("user", "老朋友"),
        ("assistant", "likes"),
    ]
    messages = [{"role": role, "content": content} for role, content in turns]
    messages[2]["weight"] = 0
    write_rows("chats.jsonl", [{"messages": messages}])
    said = command(train_sft_minimind, [*sft_argv["sft_ar"], "--show-batch", "--max-seq-len", "128"]).out
    shown = "".join(f"<|im_start|>{role}\\n{content}<|im_end|>\\n" for role, content in turns[:4])
    (learnt,) = re.findall(rf"\({re.escape(shown)}<\|im_start\|>assistant\\n\)(.*)<\|im_end\|>", said)[:1]
    assert learnt == "likes"
