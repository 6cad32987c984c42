"""Likelihood of documents: every token once, whatever the windows, the batches and the order of the rows."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from dataset.content import language_of
from dataset.tokenizer import encode, encode_chat
from model.checkpoint import load_checkpoint, write_archive
from model.likelihood import row_nats
from scripts.engine.likelihood.documents import (
    Likelihood,
    ends_given,
    evaluate_file,
    masked_cross_entropy,
    response_likelihood,
)
from scripts.engine.likelihood.windows import DataEvalConfig, TextCanvas, Window, collate, windows_of
from scripts.engine.loaded import load_for_use
from scripts.engine.prompts import Prompt
from scripts.eval import eval_diffusion, eval_minimind, likelihood
from tests.model.bounds import block_bound, enumerated_bound
from tests.scripts.models import RUNTIME, ready

KINDS = ["causal", "full"]


def close(a: float, b: float) -> bool:
    return a == pytest.approx(b, rel=1e-6, abs=1e-6, nan_ok=True)


@pytest.mark.parametrize("max_length", [2, 3, 7, 32, 33, 1000])
def test_windows_score_every_token_but_bos_exactly_once_in_order(max_length, tokenizer, texts, data):
    """Each window begins with the token before its first scored one."""
    documents, windows = windows_of(tokenizer, data(texts), max_length)
    assert len(documents) == len(texts)
    scored = [[] for _ in documents]
    for number, ids, _, begin, fill in windows:
        assert (begin, fill) == (1, 0)
        assert 2 <= len(ids) <= max_length
        expected_context = scored[number][-1] if scored[number] else tokenizer.bos_token_id
        assert ids[0] == expected_context
        scored[number] += ids[1:]
    for text, found in zip(texts, scored, strict=True):
        assert found == [*encode(tokenizer, text), tokenizer.eos_token_id]


@pytest.mark.parametrize("kind", [*KINDS, "block 2"])
def test_the_counts_are_those_of_the_text_at_every_window_size(kind, tokenizer, texts, data):
    loaded, texts = ready(tokenizer, kind), texts[::2]
    for max_length in (5, 32, 300):
        found = evaluate_file(replace(loaded, max_length=max_length), data(texts))["all"]
        assert found.documents == len(texts)
        assert found.tokens == sum(len(encode(tokenizer, t)) + 1 for t in texts)
        assert found.bytes == sum(len(t.encode()) for t in texts)


@pytest.mark.parametrize("max_length", [16, 400])
def test_an_ar_document_costs_the_sum_of_its_conditional_token_costs(max_length, tokenizer, texts, data):
    """Against one plain forward pass per window, without padding, batching, masks or selection."""
    loaded, nats = ready(tokenizer, "causal", max_length), 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *encode(tokenizer, text), tokenizer.eos_token_id]])
        for start in range(0, ids.shape[1] - 1, max_length - 1):
            window = ids[:, start : start + max_length]
            with torch.no_grad():
                logits = loaded.model(window, is_causal=True)[0, :-1].double().log_softmax(-1)
            nats -= float(logits.gather(1, window[0, 1:, None]).sum())
    likelihoods = evaluate_file(loaded, data(texts))["all"]
    assert likelihoods.kind == "exact" and likelihoods.mask_standard_error == 0
    assert close(likelihoods.nats_per_token, nats / likelihoods.tokens)
    assert close(likelihoods.bits_per_byte, nats / math.log(2) / likelihoods.bytes)
    assert close(likelihoods.perplexity, math.exp(nats / likelihoods.tokens))


@pytest.mark.parametrize("kind", [*KINDS, "block 2", "block 6"])
def test_the_batch_size_changes_nothing(kind, tokenizer, texts, data):
    loaded = ready(tokenizer, kind, 24)
    results = [evaluate_file(loaded, data(texts[::3], eval_batch_size=size)) for size in (1, 2, 7, 1000)]
    for result in results[1:]:
        assert result.keys() == results[0].keys()
        for group, value in result.items():
            for field in ("nats_per_token", "standard_error", "mask_standard_error", "bits_per_byte"):
                assert close(getattr(value, field), getattr(results[0][group], field)), (group, field)


@pytest.mark.parametrize("uniform", [False, True])
def test_the_batch_size_does_not_change_the_masked_cross_entropy(uniform, tokenizer, texts, data):
    loaded = ready(tokenizer, "full", 24, uniform)
    losses = [masked_cross_entropy(loaded, data(texts[::3], eval_batch_size=size), 0.5) for size in (1, 7, 1000)]
    assert all(close(loss, math.log(len(tokenizer) - 1) if uniform else losses[0]) for loss in losses)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_rows_changes_nothing(kind, tokenizer, texts, data):
    """Masks follow the text, so that a bound is the same number, too."""
    loaded = ready(tokenizer, kind, 24)
    there, back = data(texts), data(texts[::-1], "reversed.jsonl")
    a, b = (evaluate_file(loaded, config) for config in (there, back))
    assert a.keys() == b.keys()
    for group in a:
        assert a[group].kind == b[group].kind
        for field in (f.name for f in fields(Likelihood) if f.name != "kind"):
            assert close(getattr(a[group], field), getattr(b[group], field)), (group, field)
    if kind == "full":
        c, d = (masked_cross_entropy(loaded, config, 0.5) for config in (there, back))
        assert close(c, d)


def test_the_seed_draws_the_masks_and_equal_texts_share_them(tokenizer, texts, data):
    loaded, once = ready(tokenizer, "full", 24), data(texts[:9])
    a = evaluate_file(loaded, once)["all"].nats_per_token
    b = evaluate_file(replace(loaded, runtime=replace(RUNTIME, seed=12)), once)["all"].nats_per_token
    twice = evaluate_file(loaded, data(texts[:9] * 2, "twice.jsonl"))["all"].nats_per_token
    assert a != pytest.approx(b, abs=1e-4) and close(twice, a)
    seeds = [window.seed for window in windows_of(tokenizer, once, 24)[1]]
    assert len(set(seeds)) == len(seeds), "windows of one document, or two documents, share their masks"


@pytest.mark.parametrize("kind, choices", [("causal", 0), ("full", 1), ("block 2", 1), ("block 6", 1)])
@pytest.mark.parametrize("max_length", [9, 300])
def test_a_model_that_knows_nothing_costs_the_logarithm_of_its_choices(
    kind, choices, max_length, tokenizer, texts, data
):
    """Diffusion has one choice less: [MASK] is never predicted. Its estimate is exact here, whatever the masks."""
    found = evaluate_file(ready(tokenizer, kind, max_length, uniform=True), data(texts))
    expected = math.log(len(tokenizer) - choices)
    for value in found.values():
        assert close(value.nats_per_token, expected)
        assert value.perplexity == pytest.approx(len(tokenizer) - choices, rel=1e-5)
        assert close(value.bits_per_byte, expected / math.log(2) * value.tokens / value.bytes)
        assert value.standard_error < 1e-5 and value.mask_standard_error < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_scripts_add_up_to_all(kind, tokenizer, texts, data):
    found = evaluate_file(ready(tokenizer, kind, 24), data(texts))
    assert found.keys() == {"all", "zh", "other"}
    for field in ("documents", "tokens", "bytes"):
        assert getattr(found["all"], field) == sum(getattr(found[s], field) for s in ("zh", "other"))
    for rate, weight in (("nats_per_token", "tokens"), ("bits_per_byte", "bytes")):
        parts = sum(getattr(found[s], rate) * getattr(found[s], weight) for s in ("zh", "other"))
        assert close(getattr(found["all"], rate), parts / getattr(found["all"], weight))


def test_scripts():
    assert [language_of(t) for t in ("你好", "hello", "", "123", "hello 你好", "a long sentence 你")] == [
        *("zh", "other", "other", "other", "zh", "other")
    ]


@pytest.mark.parametrize("text", ["my old friend", "a"])
@pytest.mark.parametrize("content", ["the cat", "", [{"role": "user", "content": "the cat"}]])
@pytest.mark.parametrize("kind", [*KINDS, "block 2", "block 6"])
def test_a_response_is_scored_after_the_ids_of_its_prompt(kind, content, text, tokenizer):
    """For a causal model the chain rule, for diffusion all sets of masks, whole or block by block, of the three tokens
    of the response; one token has one set."""
    loaded = ready(tokenizer, kind, 64)
    if isinstance(content, str):
        condition = [tokenizer.bos_token_id, *encode(tokenizer, content)]
    else:
        condition = encode_chat(tokenizer, content, True)
    response = encode(tokenizer, text)
    ids, begin = torch.tensor([condition + response]), len(condition)
    assert len(response) == (1 if text == "a" else 3)
    with torch.no_grad():
        if kind == "causal":
            logs = loaded.model(ids, is_causal=True)[0, begin - 1 : -1].double().log_softmax(-1)
            expected = float(logs.gather(1, ids[0, begin:, None]).sum())
        elif kind == "full":
            expected = -enumerated_bound(loaded.model, ids[0], begin)
        else:
            expected = -block_bound(loaded.model, ids[0], torch.arange(ids.shape[1]) >= begin)
    found = response_likelihood(loaded, Prompt(content), text, 300)
    assert found["log_likelihood"] == pytest.approx(expected, abs=1e-4 + 4.5 * found["mask_standard_error"])
    drawn = text != "a" and kind in ("full", "block 6")
    assert found["tokens"] == len(response) and drawn == (found["mask_standard_error"] > 1e-6)


def test_the_masks_of_a_response_share_forward_passes(tokenizer):
    loaded, rows = ready(tokenizer, "full", 64), []
    loaded.model.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    response_likelihood(loaded, Prompt("the cat"), " sees my old friend.", 70)
    assert rows == [32, 32, 6]


@pytest.mark.parametrize("masks", [1, 2])
def test_the_command_scores_a_response_with_any_number_of_masks(masks, saved, command):
    """One mask has no standard error, which is no reason to fail."""
    argv = saved("full", "--prompt", "the cat", "--cond-ll-response", " sees the", "--cond-ll-nmc", masks)
    said = command(eval_diffusion, argv)
    assert said.code == 0 and f"{masks} mask" in said.out
    score = json.loads(command(eval_diffusion, [*argv, "--json"]).out)["conditional"]
    assert (score["mask_standard_error"] is None) == (masks == 1) and f"{score['log_likelihood']:.4f}" in said.out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_evaluation_commands_agree_with_the_library(dtype, saved, tokenizer, command):
    result = command(eval_minimind, saved("causal", "--eval-data", "corpus.jsonl", "--json", "--dtype", dtype))
    loaded = load_for_use(Path("m.pt"), tokenizer, 256, RUNTIME)
    exact = evaluate_file(loaded, DataEvalConfig(eval_data=Path("corpus.jsonl")))["all"]
    found = json.loads(result.out)["likelihood"]["all"]
    assert found["nats_per_token"] == pytest.approx(exact.nats_per_token, rel=1e-6 if dtype == "float32" else 2e-2)
    assert found["tokens"] == exact.tokens


def test_the_model_sees_no_dropout_in_an_evaluation(saved, command):
    argv = saved("causal", "--eval-data", "corpus.jsonl", "--json")
    file = load_checkpoint(Path("m.pt"))
    write_archive("m.pt", {**file, "config": file["config"] | {"dropout": 0.5}})
    one, two = (json.loads(command(eval_minimind, argv).out)["likelihood"] for _ in range(2))
    assert one == two


def test_a_single_document_has_no_error_to_show(tokenizer, data):
    result = evaluate_file(ready(tokenizer, "causal", 64), data(["the cat sees the river."]))["all"]
    assert "+-" not in result.line() and "nan" not in result.line()
    several = evaluate_file(ready(tokenizer, "causal", 64), data(["the cat.", "my old friend."]))["all"]
    assert several.line().count("+-") == 2


def test_a_context_longer_than_the_one_trained_on_is_noted(eval_argv, command):
    for length, noted in (("32", False), ("33", True)):
        result = command(eval_minimind, [*eval_argv["eval_minimind"], "--max-seq-len", length])
        assert result.code == 0
        assert ("was trained on at most 32 tokens; --max-seq-len 33" in result.err) == noted


# -- checkpoints of block diffusion ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, bound, drawn",
    [("full", "upper bound", True), ("block 1", "exact", False), ("block 3", "upper bound", False)]
    + [("block 6", "upper bound", True)],
)
def test_both_commands_score_a_file_alike(kind, bound, drawn, saved, command):
    """With the same masks, a checkpoint of blocks in its blocks."""
    argv = saved(kind, "--eval-data", "corpus.jsonl", "--eval-batch-size", "8", "--eval-max-batches", "1", "--json")
    said = command(likelihood, [*argv, "r.json"])
    assert said.code == 0 and "m.pt: diffusion" in said.err and ("in blocks of" in said.err) == (kind != "full")
    found = json.loads(Path("r.json").read_text(encoding="utf-8"))
    assert f"{found['attention']} {found['block_size']}".removesuffix(" 0") == kind
    value = found["likelihood"]["all"]
    assert value["kind"] == bound and (value["mask_standard_error"] > 0) == drawn
    other = json.loads(command(eval_diffusion, argv).out)
    assert all(other[name] == found[name] for name in ("attention", "block_size", "likelihood"))


@pytest.mark.parametrize(
    "module, argv",
    [
        (likelihood, ["--eval-data", "corpus.jsonl", "--eval-max-batches", "1", "--nmc", "2"]),
        (eval_diffusion, ["--eval-data", "corpus.jsonl", "--eval-max-batches", "1", "--nmc", "2"]),
        (eval_diffusion, ["--prompt", "a", "--cond-ll-response", "b", "--cond-ll-nmc", "2"]),
    ],
)
def test_the_number_of_masks_is_no_question_where_all_are_tried(module, argv, saved, refused, command):
    refused(module, saved("block 3", *argv), "has no effect without masks to be drawn")
    assert command(module, saved("block 6", *argv)).code == 0


@pytest.mark.parametrize("size, sign", [(1, "="), (2, ">=")])
def test_a_response_is_said_to_be_exact_or_bounded(size, sign, saved, command):
    said = command(eval_diffusion, saved(f"block {size}", "--prompt", "the cat", "--cond-ll-response", " sees"))
    first, score = said.out.splitlines()
    assert first.endswith(f"m.pt: diffusion in blocks of {size} token{'s' * (size > 1)}")
    assert f"log p(response | prompt) {sign} -" in score and "+-" not in score and score.endswith("all masks)")


def test_blanks_saved_are_filled_and_what_they_do_not_see_is_said(saved, command):
    said = command(eval_diffusion, saved("block 3", "--infill", "the cat ___ the river.", "--blank-tokens", "2"))
    assert said.code == 0 and "note: blanks are filled in blocks of 3 tokens: what stands behind" in said.err


# -- whole blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("max_length", [8, 32, 400])
def test_a_canvas_of_whole_blocks_adds_eos_behind_the_last_window_alone(size, max_length, tokenizer, texts, data):
    """Up to the end of its last block, or of the context; scored, not counted, and under the same masks."""
    documents, plain = windows_of(tokenizer, data(texts), max_length)
    others, filled = windows_of(tokenizer, data(texts), max_length, canvas=TextCanvas(block_size=size))
    assert documents == others and len(plain) == len(filled)
    for ours, theirs in zip(plain, filled, strict=True):
        last = ours.ids[-1] == tokenizer.eos_token_id
        fill = min(-len(ours.ids) % size, max_length - len(ours.ids)) if last else 0
        assert theirs == ours._replace(ids=ours.ids + [tokenizer.eos_token_id] * fill, fill=fill)
    assert size == 1 or any(window.fill for window in filled)


def test_documents_are_scored_on_whole_blocks_if_the_training_had_them(tokenizer, data):
    """The bound of text, EOS and fill is the chain of its blocks; the text's tokens are counted. And it is said where
    a model is told instead where the text ends."""
    text, size = "the cat sees", 3
    given, whole = (replace(ready(tokenizer, f"block {size}"), whole_blocks=whole) for whole in (False, True))
    ids = [tokenizer.bos_token_id, *encode(tokenizer, text), tokenizer.eos_token_id]
    filled = ids + [tokenizer.eos_token_id] * (-len(ids) % size)
    assert len(filled) > len(ids)
    for loaded, scored in ((given, ids), (whole, filled)):
        found = evaluate_file(loaded, data([text]))["all"]
        batch = collate([Window(0, scored, 1)], tokenizer.pad_token_id)
        assert found.tokens == len(ids) - 1
        assert close(found.nats_per_token * found.tokens, float(row_nats(loaded.model, batch, 1).nats))
    assert [ends_given(loaded) for loaded in (given, whole)] == [True, False]
    assert [ends_given(ready(tokenizer, kind)) for kind in ("causal", "full", "block 1")] == [False, True, False]
