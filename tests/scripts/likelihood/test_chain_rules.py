"""Bound and chain rules side by side, of the same documents or replies."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from scripts.engine.likelihood.chain_rules import chain_rules, sampled
from scripts.engine.likelihood.documents import add_nats, evaluate_replies
from scripts.engine.likelihood.windows import windows_of
from scripts.eval import likelihood
from tests.scripts.likelihood.conftest import QUESTIONS, turns
from tests.scripts.models import ready

ORDERS = {"left to right", "by confidence"}
CHATS = [turns("the cat sees", "my old friend."), turns("一只小猫", "看见了老朋友", "the river", "follows the river.")]


def scored(loaded, tokenizer, config):
    documents, windows = windows_of(tokenizer, config, loaded.max_length)
    add_nats(loaded, documents, windows, config)
    return documents, windows


@pytest.mark.parametrize("kind", ["full", "block 1", "block 3", "joint 3"])
def test_a_sample_is_scored_by_every_rule_whatever_the_batches_and_the_order_of_the_rows(kind, tokenizer, texts, data):
    """Documents of several windows among them."""
    loaded, texts = ready(tokenizer, kind, 12), [text[:30] for text in texts[:9]]
    runs = []
    for rows, name, size in ((texts, "a.jsonl", 32), (texts[::-1], "b.jsonl", 2)):
        config = data(rows, name, eval_batch_size=size)
        documents, windows = scored(loaded, tokenizer, config)
        found = chain_rules(loaded, documents, windows, config, 4)
        assert found.keys() == {"bound", *ORDERS} | ({"autoregressive"} if kind == "joint 3" else set())
        for some in found.values():
            assert some.keys() == set(sampled(windows, 4)) and len(some) == 4
            assert all((d.tokens, d.bytes) == (documents[n].tokens, documents[n].bytes) for n, d in some.items())
        assert all(found["bound"][number] is documents[number] for number in found["bound"])
        runs.append({rule: {rows[n]: d.nats for n, d in some.items()} for rule, some in found.items()})
    for rule, nats in runs[0].items():
        assert nats == pytest.approx(runs[1][rule], rel=1e-5)
        if kind == "block 1":
            assert nats == pytest.approx(runs[0]["bound"], rel=1e-5)


def test_joint_weights_pay_autoregressively_what_they_do_when_declared_causal(tokenizer, texts, data):
    """Replies, too, where the fill of the last block costs nothing."""
    joint, config = ready(tokenizer, "joint 3", 24), data(texts[:9])
    causal = replace(joint, model=ready(tokenizer, "causal", 24).model)
    causal.model.load_state_dict(joint.model.state_dict())
    documents, windows = scored(joint, tokenizer, config)
    exact, _ = scored(causal, tokenizer, config)
    found = chain_rules(joint, documents, windows, config, 9)["autoregressive"]
    assert [found[n].nats for n in range(9)] == pytest.approx([d.nats for d in exact], rel=1e-5)


def test_a_reply_costs_autoregressively_the_same_on_any_canvas(tokenizer, file):
    joint = ready(tokenizer, "joint 4", 256)
    causal = replace(joint, model=ready(tokenizer, "causal", 256).model)
    causal.model.load_state_dict(joint.model.state_dict())
    config = file([{"conversations": chat} for chat in CHATS])
    (_, filled), (_, bare) = (evaluate_replies(loaded, config, 0) for loaded in (joint, causal))
    assert any(window.fill for window in filled.windows)
    found = chain_rules(joint, filled.conversations, filled.windows, config, 2)["autoregressive"]
    assert [found[n].nats for n in range(2)] == pytest.approx([d.nats for d in bare.conversations], rel=1e-5)


@pytest.mark.parametrize("rows", ["text", "chat"])
@pytest.mark.parametrize("kind", ["full", "joint 3"])
def test_the_command_says_each_beside_the_bound(kind, rows, saved, file, texts, command):
    data = file(
        [{"text": text[:20]} for text in texts[:6]] if rows == "text" else [{"conversations": c} for c in CHATS]
    )
    argv = saved(kind, "--eval-data", data.eval_data, "--chain-rule-documents", "2", "--json", "r.json", "--seed", "3")
    argv += ["--canvas", "24"] if rows == "chat" and kind == "full" else []
    said = command(likelihood, argv)
    assert said.code == 0, said.err
    found = json.loads(Path("r.json").read_text(encoding="utf-8"))["chain_rules"]["all"]
    assert {value["documents"] for value in found.values()} == {2}
    assert found["bound"]["kind"] == "upper bound" and found["left to right"]["kind"] == "exact"
    for name, value in found.items():
        assert f"{value['bits_per_byte']:.4f}" in said.out and f"all, {name}: 2 " in said.out
        below = value.get("bits_per_byte_below_bound", 0)
        assert below == pytest.approx(found["bound"]["bits_per_byte"] - value["bits_per_byte"], abs=1e-9)


def test_chain_rules_are_for_diffusion_models_and_not_for_choices(saved, file, texts, refused):
    text, asked = file([{"text": text} for text in texts], "t.jsonl"), file(QUESTIONS)
    for kind, data, words in (
        ("causal", text, "without a diffusion model"),
        ("full", asked, "without text or conversations"),
    ):
        argv = saved(kind, "--eval-data", data.eval_data, "--chain-rule-documents", "2")
        refused(likelihood, argv, "--chain-rule-documents has no effect", words)
