"""Text in, text out: how a prompt reaches the model, several at once, blanks, and flags that need one another."""

import json
from pathlib import Path

import pytest

from dataset.tokenizer import decode, encode, encode_chat
from model.checkpoint import load_checkpoint, load_model, write_archive
from model.decoding.autoregressive import SamplingConfig
from model.decoding.decode import ContinuationConfig
from model.decoding.denoiser import DenoisingConfig
from scripts.engine.decoding import generation
from scripts.engine.decoding.generation import generate, generate_batch, infill
from scripts.engine.loaded import Loaded
from scripts.engine.prompts import Blanks, Prompt, prompt_tokens
from scripts.engine.runtime import RuntimeConfig
from scripts.eval import eval_diffusion, eval_minimind
from tests.scripts.commands import EVALS
from tests.scripts.models import given_tokens

MODULES = {"ar": "minimind", "dm": "diffusion", "blocks": "diffusion"}
RUNTIME = RuntimeConfig(device="cpu", dtype="float32")


# -- prompts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [[], ["--chat-wrap"], ["--no-chat-wrap"]])
@pytest.mark.parametrize("chats", [False, True])
@pytest.mark.parametrize("name", ["eval_minimind", "eval_diffusion"])
def test_a_prompt_is_put_as_the_checkpoint_was_trained_unless_a_flag_says_otherwise(
    name, chats, flags, prompting, command, canvases, tokenizer
):
    argv = prompting[name]
    file = load_checkpoint(Path(argv[1]))
    write_archive(argv[1], {**file, "chat": chats})
    result = command(EVALS[name], [*argv, "--prompt", "the cat", "--max-new-tokens", "3", *flags])
    assert result.code == 0 and result.out.startswith("the cat\u2502"), result.err
    plain = [tokenizer.bos_token_id, *encode(tokenizer, "the cat")]
    chat = encode_chat(tokenizer, [{"role": "user", "content": "the cat"}], add_generation_prompt=True)
    wrapped = flags == ["--chat-wrap"] or (not flags and chats)
    assert given_tokens(canvases[0]) == [*(chat if wrapped else plain), None, None, None]


@pytest.mark.parametrize("name, config", [("ar", SamplingConfig(ar_top_k=0)), ("dm", DenoisingConfig(gen_top_k=0))])
def test_prompts_of_one_batch_come_out_as_one_by_one(name, config, eval_argv, tokenizer):
    """Prompt i has the seed plus i; the seconds are shared."""
    loaded = Loaded(load_model(Path(f"weights/{name}_state_dict.pt")), tokenizer, RUNTIME, 64)
    prompts = [Prompt(content) for content in ("the cat", [{"role": "user", "content": "the river sees"}], "")]
    seen, observed = [], []
    together = generate_batch(
        loaded,
        prompts,
        ContinuationConfig(6, gen_seed=5),
        config,
        lambda canvas: observed.append(canvas) or seen.append,
    )
    assert [made.prompt for made in together] == ["the cat", "the river sees", ""]
    assert len({made.seconds for made in together}) == 1 and together[0].seconds > 0
    assert len(observed) == 1 and given_tokens(observed[0], 2) == [tokenizer.bos_token_id, *[None] * 6]
    assert seen[0].ids.shape == observed[0].ids.shape
    assert seen[-1].num_forward_passes == max(made.num_forward_passes for made in together)
    for i, (prompt, made) in enumerate(zip(prompts, together, strict=True)):
        alone = generate(loaded, prompt, ContinuationConfig(6, gen_seed=5 + i), config)
        assert (alone.text, alone.num_tokens, alone.ended) == (made.text, made.num_tokens, made.ended)
        assert alone.num_forward_passes == made.num_forward_passes


def test_drafts_are_counted_with_the_text_they_wrote(prompting, command):
    """Self-speculation writes what the same weights write autoregressively, and says what became of its drafts."""
    argv = [*prompting["eval_diffusion"], "--prompt", "the cat", "--max-new-tokens", "9", "--json"]
    file = load_checkpoint(Path(argv[1]))
    write_archive(argv[1], {**file, "config": file["config"] | {"attention": "joint", "block_size": 4}})
    texts = []
    for module, flags in ((eval_diffusion, ["--gen-remasking", "self_speculative"]), (eval_minimind, [])):
        result = command(module, [*argv, *flags])
        assert result.code == 0, result.err
        texts.append(json.loads(result.out)["generation"])
    drafted, plain = texts
    assert drafted["text"] == plain["text"] and plain["num_drafted"] is None
    assert 0 <= drafted["num_accepted"] <= drafted["num_drafted"] > 0
    shown = command(eval_diffusion, [*argv[:-1], "--gen-remasking", "self_speculative"]).out
    assert f"{drafted['num_accepted']} of {drafted['num_drafted']} drafted tokens kept" in shown


def test_edits_are_counted_beside_the_passes(prompting, command):
    argv = [*prompting["eval_diffusion"], "--prompt", "the cat", "--max-new-tokens", "9", "--json", "--gen-temp", "1"]
    argv += ["--gen-remasking", "threshold", "--gen-confidence-threshold", "0.001"]
    made = []
    for flags in ([], ["--gen-edit-threshold", "0"]):
        result = command(eval_diffusion, [*argv, *flags])
        assert result.code == 0, result.err
        made.append(json.loads(result.out)["generation"])
    plain, edited = made
    assert plain["num_edits"] is None and edited["num_edits"] > 0
    assert edited["num_forward_passes"] > plain["num_forward_passes"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--gen-edit-threshold", "0.5", "--gen-mode", "speed"], "--gen-edit-threshold has no effect"),
        (["--gen-confidence-threshold", "0.8", "--gen-mode", "speed"], "--gen-confidence-threshold has no effect"),
        (["--gen-remasking", "margin", "--gen-mode", "quality"], "--gen-remasking has no effect"),
        (["--gen-steps", "9", "--gen-mode", "quality"], "--gen-steps has no effect"),
        (["--gen-post-edits", "3"], "--gen-post-edits has no effect"),
        (["--gen-edit-threshold", "0", "--no-gen-edit"], "--gen-edit-threshold has no effect"),
        (["--no-gen-edit"], "--gen-edit has no effect"),
        (["--gen-mode", "speed", "--no-gen-edit", "--gen-edit-blocks", "1"], "--gen-edit-blocks has no effect"),
    ],
)
def test_a_mode_stands_alone_and_edits_are_not_set_where_there_are_none(flags, words, prompting, refused):
    refused(eval_diffusion, [*prompting["eval_diffusion"], "--prompt", "the cat", *flags], words)


@pytest.mark.parametrize(
    "flags",
    [
        ["--gen-cfg-scale", "1"],
        ["--gen-steps", "4"],
        ["--gen-cache", "none"],
        ["--gen-penalty-lambda", "1"],
        ["--gen-mode", "speed"],
        ["--gen-edit-threshold", "0.5"],
    ],
)
def test_settings_of_denoising_have_no_effect_on_self_speculation(flags, prompting, refused):
    argv = [*prompting["eval_diffusion"], "--prompt", "the cat", "--gen-remasking", "self_speculative", *flags]
    refused(eval_diffusion, argv, f"{flags[0]} has no effect")


def test_a_prompt_is_never_cut(tokenizer):
    for prompt in (Prompt("the cat sees"), Prompt([{"role": "user", "content": "the cat sees"}])):
        ids = prompt_tokens(tokenizer, prompt, 5, 1000)
        assert prompt_tokens(tokenizer, prompt, 5, len(ids) + 5) == ids
        with pytest.raises(ValueError, match=f"the prompt's {len(ids)} tokens and --max-new-tokens 5 exceed"):
            prompt_tokens(tokenizer, prompt, 5, len(ids) + 4)


@pytest.mark.parametrize("kind", ["ar", "dm", "blocks"])
def test_a_prompt_of_any_length_that_fits_is_put_whole_and_one_token_more_is_refused(
    kind, prompting, command, refused, canvases, tokenizer
):
    """Nothing but BOS, a whole block, one token less and more; prompt and continuation fill the context exactly."""
    size, new = 4, 5
    module, argv = (eval_minimind if kind == "ar" else eval_diffusion), prompting[f"eval_{MODULES[kind]}"][:4]
    if kind == "blocks":
        file = load_checkpoint(Path(argv[1]))
        write_archive(argv[1], {**file, "config": file["config"] | {"attention": "block", "block_size": size}})
    argv += ["--dtype", "float32", "--max-new-tokens", str(new), "--no-chat-wrap"]
    for length in (1, size - 1, size, size + 1, 2 * size):
        ids = encode(tokenizer, "the cat sees the river. my old friend likes a small dog.")[: length - 1]
        prompt = decode(tokenizer, ids)
        result = command(module, [*argv, "--prompt", prompt, "--seq-len", str(length + new)])
        assert result.code == 0, result.err
        assert given_tokens(canvases[-1]) == [tokenizer.bos_token_id, *ids, *[None] * new] and len(ids) == length - 1
        words = f"the prompt's {length} tokens and --max-new-tokens {new} exceed --max-seq-len {length + new - 1}"
        refused(module, [*argv, "--prompt", prompt, "--seq-len", str(length + new - 1)], words)


# -- blanks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["从前有___,最后____。", "___", "a__b___c", "___the cat______ sees"])
@pytest.mark.parametrize("asked", [None, "the river?"])
def test_the_blanks_of_a_text_are_filled_and_the_rest_is_kept_token_for_token(
    text, asked, prompting, command, canvases, tokenizer, monkeypatch
):
    decoded, timed = [], generation.decode_timed
    monkeypatch.setattr(generation, "decode_timed", lambda *a: decoded.append(timed(*a)) or decoded[-1])
    flags = [] if asked is None else ["--chat-wrap", "--prompt", asked]
    argv = [*prompting["eval_diffusion"], "--infill", text, "--blank-tokens", "4", "--json", *flags]
    result = command(eval_diffusion, argv)
    assert result.code == 0, result.err
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    head = [bos]
    if asked is not None:
        head = encode_chat(tokenizer, [{"role": "user", "content": asked}], add_generation_prompt=True)
    expected, rest = list(head), text
    while "___" in rest:
        before, _, rest = rest.partition("___")
        expected += [*encode(tokenizer, before), *[None] * 4]
        rest = rest.lstrip("_")
    expected += [*encode(tokenizer, rest), eos]
    assert given_tokens(canvases[0]) == expected
    final = decoded[0][0].ids[0].tolist()
    assert all(token in (None, filled) for token, filled in zip(expected, final, strict=True))
    made = json.loads(result.out)["generation"]
    blanks = expected.count(None)
    assert made["prompt"] == text and made["num_tokens"] == blanks and made["ended"]
    assert made["text"] == generation.decode(tokenizer, final[len(head) : -1])
    filled = [token for token, before in zip(final, expected, strict=True) if before is None]
    assert not {eos, tokenizer.mask_token_id} & set(filled)


def test_a_text_is_not_written_where_a_blank_is_short(tokenizer):
    with pytest.raises(ValueError, match="no blank: write ___"):
        Blanks("snake_case and __dunder__", 4).encode(tokenizer)


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--infill", "no blank"], "--infill has no blank"),
        (["--infill", "a___", "--max-new-tokens", "9"], "--max-new-tokens has no effect with --infill"),
        (["--infill", "a___", "--gen-eos", "never"], "--gen-eos"),
        (["--infill", "a___", "--prompt", "b"], "--prompt has no effect on --infill outside the chat template"),
        (["--infill", "a___", "--chat-wrap"], "--infill in the chat template needs --prompt"),
        (["--infill", "a___", "--prompt", "b", "--cond-ll-response", "c"], "--cond-ll-response scores"),
        (["--infill", "a___", "--blank-tokens", "300"], "more than --max-seq-len 256"),
    ],
)
def test_an_infilling_that_cannot_be_is_refused(flags, word, prompting, refused):
    refused(eval_diffusion, [*prompting["eval_diffusion"], *flags], word)


def test_a_text_with_blanks_may_fill_the_context_and_no_more(eval_argv, tokenizer):
    model = load_model(Path("weights/dm_state_dict.pt"))
    blanks, config = Blanks("a___b", 5), DenoisingConfig(gen_steps=1)
    length = len(blanks.encode(tokenizer)[0])
    assert infill(Loaded(model, tokenizer, RUNTIME, length), blanks, ContinuationConfig(), config).num_tokens == 5
    with pytest.raises(ValueError, match=f"{length} tokens long, more than --max-seq-len {length - 1}"):
        infill(Loaded(model, tokenizer, RUNTIME, length - 1), blanks, ContinuationConfig(), config)


def test_an_autoregressive_model_fills_no_blanks(eval_argv, tokenizer):
    model = load_model(Path("weights/ar_state_dict.pt"))
    with pytest.raises(ValueError, match="infilling needs one of diffusion"):
        infill(Loaded(model, tokenizer, RUNTIME, 64), Blanks("a___b", 2), ContinuationConfig(), SamplingConfig())
