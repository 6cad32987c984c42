"""Documents whose last block is filled: training shows them as decoding lays them; their fill counts as no token."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dataset.pretrain import DocumentFill, PackedRows, TokenSplit
from model.block_diffusion import denoising_inputs
from model.checkpoint import load_checkpoint, write_archive
from model.decoding.canvas import Canvas
from model.decoding.denoiser import Denoiser, DenoisingConfig
from model.forward_process import StepNoise
from model.losses import forbid
from model.masked_diffusion import MaskedDiffusion
from scripts.engine.loaded import load_for_use
from scripts.train import diffusion
from tests.scripts.models import RUNTIME

SIZE, LENGTHS = 4, (5, 7, 10, 3, 8, 6)


def rows_of(config, fill=True):
    """Documents of these lengths, two or more to a row."""
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(4, config.vocab_size, (length - 2,), generator=generator) for length in LENGTHS]
    ends = [torch.tensor([token]) for token in (config.bos_token_id, config.eos_token_id)]
    tokens = torch.cat([torch.cat([ends[0], ids, ends[1]]) for ids in documents]).numpy().astype(np.uint16)
    split = TokenSplit(tokens, np.cumsum([0, *LENGTHS])[:-1].astype(np.int64))
    filled = DocumentFill(config.eos_token_id, SIZE) if fill else None
    return PackedRows(split, 24, True, config.pad_token_id, True, filled)


def in_training(model, batch, row, columns):
    """The largest probability at each of some columns of a row, all of which are masked."""
    batch = {name: tensor[row : row + 1] for name, tensor in batch.items()}
    places = torch.tensor(columns)
    noised = batch["input_ids"].index_fill(1, places, model.config.mask_token_id)
    causal = model.config.attention == "joint"
    ids, more = denoising_inputs(noised, batch["input_ids"], batch["document_ids"], SIZE, places, causal)
    return forbid(model(ids, **more).float(), model.config.mask_token_id).softmax(dim=-1).amax(dim=-1)


@pytest.mark.parametrize("attention", ["block", "joint"])
@pytest.mark.parametrize("fill", [True, False])
def test_a_document_is_predicted_in_training_as_in_decoding(fill, attention, tiny_model):
    """From any token of a document on, to the end of that token's block; without fill not in the last block."""
    model, config = tiny_model(attention=attention, block_size=SIZE), DenoisingConfig(gen_temp=0, gen_repeat_penalty=0)
    rows = rows_of(model.config, fill)
    batch, compared, differing = rows.batch(np.arange(len(rows))), 0, 0
    for row, documents in enumerate(batch["document_ids"]):
        for number in range(int(documents.max()) + 1):
            columns = (documents == number).nonzero()[:, 0].tolist()
            ids = batch["input_ids"][row, columns].tolist()
            length = ids.index(model.config.eos_token_id) + 1 if model.config.eos_token_id in ids else len(ids)
            if ids[0] != model.config.bos_token_id:
                continue  # the rest of a document, of which a row does not see the beginning
            for given in range(1, length):
                canvas = Canvas.continuing([ids[:given]], length - given, model.config)
                decoder = Denoiser(model, canvas, config, [0])
                found = decoder.predict()
                open_columns = [
                    column for column in columns[given:] if column - columns[0] < -(-(given + 1) // SIZE) * SIZE
                ]
                with torch.no_grad():
                    trained = in_training(model, batch, row, open_columns)
                same = len(trained) == len(found.confidence) and torch.allclose(trained, found.confidence, atol=1e-4)
                compared, differing = compared + 1, differing + (not same)
    assert compared > 20 and (differing == 0) == fill


@pytest.mark.parametrize(
    "changes", [{}, {"mask_schedule": "iid_t"}, {"mask_schedule": "wsd"}, {"mask_schedule": "random"}]
)
def test_fill_costs_nats_but_counts_as_no_token(changes, tiny_model):
    """A row stands for its text's share of what it would stand for if the fill were text, whatever the schedule."""
    model = tiny_model(attention="block", block_size=SIZE)
    rows = rows_of(model.config)
    batch, noise = rows.batch(np.arange(len(rows))), StepNoise(1, 2, len(rows), progress=0.5)
    bare = {name: tensor for name, tensor in batch.items() if name != "fill"}
    for copies, size in (({}, SIZE), ({}, 0), ({"complementary_masks": True}, SIZE)):
        if copies and changes:
            continue
        objective = MaskedDiffusion(block_size=size, variable_length_prob=0.0, **changes, **copies)
        with torch.no_grad():
            made, other = objective(model, batch, noise), objective(model, bare, noise)
        text, all_tokens = ((mask & batch["loss_mask"]).sum(dim=1) for mask in (~batch["fill"], batch["loss_mask"]))
        assert torch.equal(made.nats, other.nats) and (text < all_tokens).any()
        torch.testing.assert_close(made.count * all_tokens, other.count * text)
    validated = objective.for_validation()
    with torch.no_grad():
        assert torch.equal(validated(model, batch, noise).count, text.float())


def test_rows_cut_to_a_random_length_count_the_text_that_is_left(tiny_model):
    model = tiny_model(attention="block", block_size=SIZE)
    rows = rows_of(model.config)
    batch = rows.batch(np.arange(len(rows)))
    objective, lengths = MaskedDiffusion(block_size=SIZE, variable_length_prob=1.0), set()
    for step in range(20):
        prepared = objective.prepare(batch, model.config, StepNoise(1, step, len(rows)))
        length = prepared["input_ids"].shape[1]
        text = (batch["loss_mask"] & ~batch["fill"])[:, :length].sum(dim=1).float()
        torch.testing.assert_close(prepared["count"], text)
        lengths.add(length)
    assert len(lengths) > 5


def test_a_run_that_is_older_than_the_fill_goes_on_without_it(diffusion_argv, command, refused, tokenizer):
    """And its documents are scored as it was trained; a new run's on whole blocks."""
    argv, without = [*diffusion_argv, "--block-size", "4"], "--no-quantize-effective-length"
    refused(diffusion, [*diffusion_argv, without], "--quantize-effective-length has no effect without block diffusion")
    refused(diffusion, [*argv, "--eos-fill", "3"], "--eos-fill has no effect with block diffusion")
    path, loaded = Path("weights/dm.pt"), []
    for flags in ([], ["--overwrite", without]):
        assert command(diffusion, [*argv, *flags]).code == 0
        loaded.append(load_for_use(path, tokenizer, 32, RUNTIME).whole_blocks)
    assert loaded == [True, False]
    state = load_checkpoint(path)
    del state["settings"]["quantize_effective_length"]
    write_archive(path, state)
    again = [*argv, "--resume", "must", "--max-iters", "13"]
    refused(diffusion, again, "--quantize-effective-length was False, is True")
    assert command(diffusion, [*again, without]).code == 0
    assert not load_for_use(path, tokenizer, 32, RUNTIME).whole_blocks
