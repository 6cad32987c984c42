"""scripts/engine/evaluation.py: every token once, whatever the windows, the batches and the order of the rows."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from dataset.jsonl import language_of
from dataset.tokenizer import encode, encode_chat, fingerprint
from model.checkpoint import save_checkpoint
from scripts.engine.likelihood.documents import (
    Likelihood,
    evaluate_file,
    masked_cross_entropy,
    response_likelihood,
)
from scripts.engine.likelihood.windows import DataEvalConfig, windows_of
from scripts.engine.prompts import Prompt
from scripts.eval import eval_diffusion, eval_minimind, likelihood, schedule_variance
from tests.model.test_likelihood import block_bound, enumerated_bound
from tests.scripts.models import RUNTIME, ready, untrained

KINDS = ["causal", "full"]


@pytest.fixture
def model_of(tokenizer):
    """model_of(attention, uniform=False) -> a model for the test's tokenizer, its logits far from uniform, or all 0."""
    return lambda attention, uniform=False: untrained(tokenizer, attention, uniform)


@pytest.fixture
def data(workspace, jsonl):
    """data(texts, name, **more) -> the evaluation of a file with these documents."""
    return lambda texts, name="eval.jsonl", **more: DataEvalConfig(
        eval_data=jsonl(workspace / name, texts), **{"num_samples": 3} | more
    )


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
def test_the_counts_are_those_of_the_text_at_every_window_size(kind, model_of, tokenizer, texts, data):
    model, texts = model_of(kind), texts[::2]
    for max_length in (5, 32, 300):
        found = evaluate_file(ready(model, tokenizer, max_length), data(texts))["all"]
        assert found.documents == len(texts)
        assert found.tokens == sum(len(encode(tokenizer, t)) + 1 for t in texts)
        assert found.bytes == sum(len(t.encode()) for t in texts)


def test_an_ar_document_costs_the_sum_of_its_conditional_token_costs(model_of, tokenizer, texts, data):
    """Against one plain forward pass per document, without padding, batching, masks or selection."""
    model = model_of("causal")
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *encode(tokenizer, text), tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(ids, is_causal=True)[0, :-1].double().log_softmax(-1)
        nats -= float(logits.gather(1, ids[0, 1:, None]).sum())
    found = evaluate_file(ready(model, tokenizer, 400), data(texts))["all"]
    assert found.kind == "exact" and found.mask_standard_error == 0
    assert close(found.nats_per_token, nats / found.tokens)
    assert close(found.bits_per_byte, nats / math.log(2) / found.bytes)
    assert close(found.perplexity, math.exp(nats / found.tokens))


def test_an_ar_document_in_windows_costs_the_sum_over_its_windows(model_of, tokenizer, texts, data):
    model, text = model_of("causal"), max(texts, key=len)
    ids = [tokenizer.bos_token_id, *encode(tokenizer, text), tokenizer.eos_token_id]
    nats, start = 0.0, 0
    while start < len(ids) - 1:
        window = torch.tensor([ids[start : start + 16]])
        with torch.no_grad():
            logits = model(window, is_causal=True)[0, :-1].double().log_softmax(-1)
        nats -= float(logits.gather(1, window[0, 1:, None]).sum())
        start += 15
    found = evaluate_file(ready(model, tokenizer, 16), data([text]))["all"]
    assert close(found.nats_per_token, nats / (len(ids) - 1))


@pytest.mark.parametrize("kind", [*KINDS, "block 2", "block 6"])
def test_the_batch_size_changes_nothing(kind, model_of, tokenizer, texts, data):
    model = model_of(kind)
    results = [
        evaluate_file(ready(model, tokenizer, 24), data(texts[::3], eval_batch_size=size)) for size in (1, 2, 7, 1000)
    ]
    for result in results[1:]:
        assert result.keys() == results[0].keys()
        for group, value in result.items():
            for field in ("nats_per_token", "standard_error", "mask_standard_error", "bits_per_byte"):
                assert close(getattr(value, field), getattr(results[0][group], field)), (group, field)


@pytest.mark.parametrize("uniform", [False, True])
def test_the_batch_size_does_not_change_the_masked_cross_entropy(uniform, model_of, tokenizer, texts, data):
    model = model_of("full", uniform)
    losses = [
        masked_cross_entropy(ready(model, tokenizer, 24), data(texts[::3], eval_batch_size=size), 0.5)
        for size in (1, 7, 1000)
    ]
    assert all(close(loss, math.log(len(tokenizer) - 1) if uniform else losses[0]) for loss in losses)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_rows_changes_nothing(kind, model_of, tokenizer, texts, data):
    """Masks follow the text, so that a bound is the same number, too."""
    model = model_of(kind)
    there, back = data(texts), data(texts[::-1], "reversed.jsonl")
    a, b = (evaluate_file(ready(model, tokenizer, 24), config) for config in (there, back))
    assert a.keys() == b.keys()
    for group in a:
        assert a[group].kind == b[group].kind
        for field in (f.name for f in fields(Likelihood) if f.name != "kind"):
            assert close(getattr(a[group], field), getattr(b[group], field)), (group, field)
    if kind == "full":
        c, d = (masked_cross_entropy(ready(model, tokenizer, 24), config, 0.5) for config in (there, back))
        assert close(c, d)


def test_the_seed_draws_the_masks_and_equal_texts_share_them(model_of, tokenizer, texts, data):
    model, once = model_of("full"), data(texts[:9])
    a = evaluate_file(ready(model, tokenizer, 24), once)["all"].nats_per_token
    b = evaluate_file(ready(model, tokenizer, 24, replace(RUNTIME, seed=12)), once)["all"].nats_per_token
    twice = evaluate_file(ready(model, tokenizer, 24), data(texts[:9] * 2, "twice.jsonl"))["all"].nats_per_token
    assert a != pytest.approx(b, abs=1e-4) and close(twice, a)
    seeds = [window.seed for window in windows_of(tokenizer, once, 24)[1]]
    assert len(set(seeds)) == len(seeds), "windows of one document, or two documents, share their masks"


@pytest.mark.parametrize("kind, choices", [("causal", 0), ("full", 1), ("block 2", 1), ("block 6", 1)])
@pytest.mark.parametrize("max_length", [9, 300])
def test_a_model_that_knows_nothing_costs_the_logarithm_of_its_choices(
    kind, choices, max_length, model_of, tokenizer, texts, data
):
    """Diffusion has one choice less: [MASK] is never predicted. Its estimate is exact here, whatever the masks."""
    found = evaluate_file(ready(model_of(kind, uniform=True), tokenizer, max_length), data(texts))
    expected = math.log(len(tokenizer) - choices)
    for value in found.values():
        assert close(value.nats_per_token, expected)
        assert value.perplexity == pytest.approx(len(tokenizer) - choices, rel=1e-5)
        assert close(value.bits_per_byte, expected / math.log(2) * value.tokens / value.bytes)
        assert value.standard_error < 1e-5 and value.mask_standard_error < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_scripts_add_up_to_all(kind, model_of, tokenizer, texts, data):
    found = evaluate_file(ready(model_of(kind), tokenizer, 24), data(texts))
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


def test_a_response_and_its_prompt_multiply_to_the_whole_text(model_of, tokenizer):
    """log p(a, b) = log p(a) + log p(b | a), for a causal model to the last digit."""
    model, a, b = model_of("causal"), "the cat", " sees 一只小猫."

    def score(prompt, response):
        return response_likelihood(ready(model, tokenizer, 64), Prompt(prompt), response, 1)

    ids = [tokenizer.bos_token_id, *encode(tokenizer, a), *encode(tokenizer, b)]
    with torch.no_grad():
        logs = model(torch.tensor([ids]), is_causal=True)[0, :-1].double().log_softmax(-1)
    tokens = logs.gather(1, torch.tensor(ids)[1:, None])[:, 0]
    whole = score("", a)["log_likelihood"] + score(a, b)["log_likelihood"]
    assert close(whole, float(tokens.sum()))
    assert score(a, b)["tokens"] == len(encode(tokenizer, b))


def test_a_response_of_one_token_is_scored_exactly_by_one_mask(model_of, tokenizer):
    model = model_of("full")
    response = next(c for c in "abcdefgh" if len(encode(tokenizer, c)) == 1)
    ids = [tokenizer.bos_token_id, *encode(tokenizer, "the cat")]
    with torch.no_grad():
        logits = model(torch.tensor([[*ids, tokenizer.mask_token_id]]))[0, -1].double()
    logits[tokenizer.mask_token_id] = -math.inf
    expected = float(logits.log_softmax(-1)[encode(tokenizer, response)[0]])
    for samples in (1, 5):
        found = response_likelihood(ready(model, tokenizer, 64), Prompt("the cat"), response, samples)
        assert close(found["log_likelihood"], expected)


@pytest.mark.parametrize("kind", [*KINDS, "block 2", "block 6"])
def test_a_response_in_the_chat_template_is_scored_after_the_ids_of_the_template(kind, model_of, tokenizer):
    """For a causal model the chain rule, for diffusion all sets of masks, whole or block by block: the response has
    three tokens."""
    model, condition = model_of(kind), encode_chat(tokenizer, [{"role": "user", "content": "the cat"}], True)
    response = encode(tokenizer, "my old friend")
    ids, begin = torch.tensor([condition + response]), len(condition)
    assert len(response) == 3
    with torch.no_grad():
        if kind == "causal":
            logs = model(ids, is_causal=True)[0, begin - 1 : -1].double().log_softmax(-1)
            expected = float(logs.gather(1, ids[0, begin:, None]).sum())
        elif kind == "full":
            expected = -enumerated_bound(model, ids[0], begin)
        else:
            expected = -block_bound(model, ids[0], torch.arange(begin + 3) >= begin)
    found = response_likelihood(
        ready(model, tokenizer, 64), Prompt([{"role": "user", "content": "the cat"}]), "my old friend", 300
    )
    assert found["log_likelihood"] == pytest.approx(expected, abs=1e-4 + 4.5 * found["mask_standard_error"])
    assert found["tokens"] == 3 and (kind in ("full", "block 6")) == (found["mask_standard_error"] > 0)


def test_the_masks_of_a_response_share_forward_passes(model_of, tokenizer):
    model, rows = model_of("full"), []
    model.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0])))
    response_likelihood(ready(model, tokenizer, 64), Prompt("the cat"), " sees my old friend.", 70)
    assert rows == [32, 32, 6]


@pytest.mark.parametrize("masks", [1, 2])
def test_the_command_scores_a_response_with_any_number_of_masks(
    masks, model_of, tokenizer, tokenizer_dir, command, workspace
):
    """One mask has no standard error, which is no reason to fail."""
    model = model_of("full")
    save_checkpoint(Path("m.pt"), model.config, model.state_dict(), tokenizer=fingerprint(tokenizer), stage="test")
    argv = ["--checkpoint", "m.pt", "--tokenizer-dir", tokenizer_dir, "--prompt", "the cat", "--dtype", "float32"]
    argv += ["--cond-ll-response", " sees the", "--cond-ll-nmc", masks]
    said = command(eval_diffusion, argv)
    assert said.code == 0 and f"{masks} mask" in said.out
    found = json.loads(command(eval_diffusion, [*argv, "--json"]).out)["conditional"]
    assert (found["mask_standard_error"] is None) == (masks == 1) and f"{found['log_likelihood']:.4f}" in said.out


def test_both_commands_bound_a_file_by_the_same_masks(model_of, tokenizer, tokenizer_dir, command, workspace):
    model = model_of("full")
    save_checkpoint(Path("m.pt"), model.config, model.state_dict(), tokenizer=fingerprint(tokenizer), stage="test")
    argv = ["--checkpoint", "m.pt", "--tokenizer-dir", tokenizer_dir, "--eval-data", "corpus.jsonl", "--device", "cpu"]
    argv += ["--dtype", "float32", "--nmc", "2", "--seed", "5"]
    assert command(likelihood, [*argv, "--json", "result.json"]).code == 0
    result = json.loads(Path("result.json").read_text(encoding="utf-8"))
    said = command(eval_diffusion, [*argv, "--json"])
    assert json.loads(said.out)["likelihood"]["all"] == result["likelihood"]["all"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_evaluation_commands_agree_with_the_library(dtype, model_of, tokenizer, tokenizer_dir, command, workspace):
    model = model_of("causal")
    save_checkpoint(Path("m.pt"), model.config, model.state_dict(), tokenizer=fingerprint(tokenizer), stage="test")
    argv = ["--checkpoint", "m.pt", "--tokenizer-dir", tokenizer_dir, "--eval-data", "corpus.jsonl", "--device", "cpu"]
    result = command(eval_minimind, [*argv, "--dtype", dtype, "--json"])
    config = DataEvalConfig(eval_data=Path("corpus.jsonl"))
    exact = evaluate_file(ready(model, tokenizer), config)["all"]
    found = json.loads(result.out)["likelihood"]["all"]
    assert found["nats_per_token"] == pytest.approx(exact.nats_per_token, rel=1e-6 if dtype == "float32" else 2e-2)
    assert found["tokens"] == exact.tokens


def test_the_model_sees_no_dropout_in_an_evaluation(model_of, tokenizer, tokenizer_dir, command, workspace):
    model = model_of("causal")
    path = Path("m.pt")
    config = replace(model.config, dropout=0.5)
    save_checkpoint(path, config, model.state_dict(), tokenizer=fingerprint(tokenizer), stage="test")
    argv = ["--checkpoint", path, "--tokenizer-dir", tokenizer_dir, "--eval-data", "corpus.jsonl", "--dtype", "float32"]
    one, two = (json.loads(command(eval_minimind, [*argv, "--json"]).out)["likelihood"] for _ in range(2))
    assert one == two


def test_a_single_document_has_no_error_to_show(model_of, tokenizer, data):
    result = evaluate_file(ready(model_of("causal"), tokenizer, 64), data(["the cat sees the river."]))["all"]
    assert "+-" not in result.line() and "nan" not in result.line()
    several = evaluate_file(ready(model_of("causal"), tokenizer, 64), data(["the cat.", "my old friend."]))["all"]
    assert several.line().count("+-") == 2


def test_a_context_longer_than_the_one_trained_on_is_noted(eval_argv, command):
    for length, noted in (("32", False), ("33", True)):
        result = command(eval_minimind, [*eval_argv["eval_minimind"], "--max-seq-len", length])
        assert result.code == 0
        assert ("was trained on at most 32 tokens; --max-seq-len 33" in result.err) == noted


# -- checkpoints of block diffusion ------------------------------------------------------------------------------------


@pytest.fixture
def in_blocks(model_of, tokenizer, tokenizer_dir, workspace):
    """in_blocks(size, *more) -> arguments with a checkpoint that is decoded in blocks of so many tokens."""

    def build(size, *more):
        model = model_of(f"block {size}")
        save_checkpoint(Path("m.pt"), model.config, model.state_dict(), tokenizer=fingerprint(tokenizer), stage="test")
        given = ["--checkpoint", "m.pt", "--tokenizer-dir", tokenizer_dir, "--dtype", "float32", "--device", "cpu"]
        return [*given, *more]

    return build


@pytest.mark.parametrize(
    "size, kind, drawn", [(1, "exact", False), (3, "upper bound", False), (6, "upper bound", True)]
)
def test_both_commands_score_a_block_checkpoint_in_its_blocks(size, kind, drawn, in_blocks, command):
    argv = in_blocks(size, "--eval-data", "corpus.jsonl", "--eval-batch-size", "8", "--eval-max-batches", "1", "--json")
    said = command(likelihood, [*argv, "r.json"])
    assert said.code == 0 and f"m.pt: diffusion in blocks of {size} token" in said.err
    found = json.loads(Path("r.json").read_text(encoding="utf-8"))
    assert (found["attention"], found["block_size"]) == ("block", size)
    value = found["likelihood"]["all"]
    assert value["kind"] == kind and (value["mask_standard_error"] > 0) == drawn
    other = json.loads(command(eval_diffusion, argv).out)
    assert (other["attention"], other["block_size"]) == ("block", size) and other["likelihood"]["all"] == value


def test_the_number_of_masks_is_no_question_where_all_are_tried(in_blocks, refused, command):
    for module, more in (
        (likelihood, ["--eval-data", "corpus.jsonl", "--nmc", "2"]),
        (eval_diffusion, ["--eval-data", "corpus.jsonl", "--nmc", "2"]),
        (eval_diffusion, ["--prompt", "a", "--cond-ll-response", "b", "--cond-ll-nmc", "2"]),
    ):
        refused(module, in_blocks(3, *more), "has no effect without masks to be drawn: of small blocks all are tried")
        assert command(module, in_blocks(6, *more, *["--eval-max-batches", "1"] * (more[0] == "--eval-data"))).code == 0


@pytest.mark.parametrize("size, sign", [(1, "="), (2, ">=")])
def test_a_response_is_said_to_be_exact_or_bounded(size, sign, in_blocks, command):
    said = command(eval_diffusion, in_blocks(size, "--prompt", "the cat", "--cond-ll-response", " sees"))
    first, score = said.out.splitlines()
    assert first.endswith(f"m.pt: diffusion in blocks of {size} token{'s' * (size > 1)}")
    assert f"log p(response | prompt) {sign} -" in score and "+-" not in score and score.endswith("all masks)")


def test_a_block_checkpoint_is_decoded_in_its_blocks_with_their_cache(in_blocks, command, refused):
    argv = in_blocks(3, "--max-new-tokens", "5", "--prompt", "the cat")
    found = json.loads(command(eval_diffusion, [*argv, "--json"]).out)
    assert (found["attention"], found["block_size"]) == ("block", 3)
    assert (found["settings"]["gen_block_size"], found["settings"]["gen_cache"]) == (3, "block")
    assert 1 <= found["generation"]["num_tokens"] <= 5
    refused(eval_diffusion, [*argv, "--gen-block-size", "4"], "--gen-block-size 4 is not 3")
    refused(eval_diffusion, [*argv, "--gen-cache", "prefix"], "trained by block diffusion")


def test_blanks_in_blocks_are_filled_and_what_they_do_not_see_is_said(in_blocks, command):
    said = command(eval_diffusion, in_blocks(3, "--infill", "the cat ___ the river.", "--blank-tokens", "2"))
    assert said.code == 0 and "note: blanks are filled in blocks of 3 tokens: what stands behind" in said.err


def test_commands_of_other_kinds_refuse_a_block_checkpoint(in_blocks, refused):
    argv = in_blocks(3)
    words = "m.pt is diffusion in blocks of 3 tokens; it is used by: uv run python -m scripts.eval.eval_diffusion"
    refused(eval_minimind, [*argv, "--prompt", "a"], words)
    refused(schedule_variance, [*argv, "--data", "corpus.jsonl"], "m.pt is diffusion in blocks of 3 tokens; schedules")
