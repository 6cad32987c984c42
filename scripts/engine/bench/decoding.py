"""Speed of decoding: every sampler on the same questions, beside a KV-cached autoregressive model of the same size and
beside 64 forward passes over the whole canvas.

Without checkpoints the weights are random: nothing is then said of quality, no text ends, and diffusion has policies of
a fixed number of steps alone, since how sure random weights are says nothing about trained ones.
"""

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch

from dataset.content import content_hash
from dataset.corpus.bundled import bundled_file
from dataset.rows.exercise_formats import Exercise, read_exercises
from dataset.tokenizer import PreTrainedTokenizerFast, decode, encode_chat, load_tokenizer
from model.config import ModelConfig
from model.decoding.autoregressive import SamplingConfig
from model.decoding.canvas import Canvas, Decoded
from model.decoding.decode import decode as fill
from model.decoding.denoiser import DenoisingConfig
from model.decoding.remasking import REMASKING, SELF_SPECULATIVE, transfer_schedule
from model.transformer import Transformer
from scripts.engine.bench.timing import Row, Timing, take_turns
from scripts.engine.decoding.samplers import ADAPTIVE, THRESHOLDED, SamplerGrid
from scripts.engine.loaded import load_for_use
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.statistics import is_correct, wilson

NAIVE_STEPS = 64
NAIVE = f"{NAIVE_STEPS} full forward passes"
TOKENS_PER_STEP = 2  # of policies with a fixed number of steps
ATTENTION = {"AR": "causal", "diffusion": "full", "blocks": "block"}  # of each kind of model
BLOCK_SIZE, PROMPT_TOKENS = 8, 40  # if weights are random
NO_EOS = -1  # an end that no token is
GREEDY = SamplingConfig(ar_temperature=0.0, ar_repeat_penalty=0.0)
DENOISING = DenoisingConfig(gen_temp=0.0, gen_repeat_penalty=0.0)
Decoder = Callable[[Canvas], Decoded]


@dataclass(frozen=True)
class DecodingBenchmarkConfig:
    """Measuring decoding."""

    decoding_ar: Annotated[
        Path | None, "autoregressive checkpoint, or a joint one (none of the three: random weights)"
    ] = None
    decoding_diffusion: Annotated[Path | None, "checkpoint of full attention, fine-tuned"] = None
    decoding_blocks: Annotated[Path | None, "checkpoint of block diffusion, or a joint one, fine-tuned"] = None
    decoding_tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    decoding_questions: Annotated[int, "questions, or random prompts, for every sampler", "at least 1"] = 32
    decoding_batch_sizes: Annotated[tuple[int, ...], "questions answered together", "at least 1"] = (1, 8)
    decoding_dtypes: Annotated[
        tuple[Literal["auto", "float32", "float16", "bfloat16"], ...],
        "precisions tried; what a sampler is compared with is the fastest of all these",
    ] = ("auto",)
    decoding_new_tokens: Annotated[int, "longest answer, and the canvas of diffusion, in tokens", "at least 1"] = 24
    decoding_policies: Annotated[tuple[Literal[*REMASKING], ...], "diffusion policies"] = REMASKING
    decoding_thresholds: Annotated[tuple[float, ...], "of the policies threshold and hybrid", "in (0, 1]"] = (0.9, 0.7)
    decoding_rounds: Annotated[int, "rounds, in each of which every sampler answers all questions", "at least 1"] = 5

    @property
    def checkpoints(self) -> dict[str, Path]:
        paths = {"AR": self.decoding_ar, "diffusion": self.decoding_diffusion, "blocks": self.decoding_blocks}
        return {kind: path for kind, path in paths.items() if path is not None}


class Exam(NamedTuple):
    """Models by kind, and the prompts that they answer; if weights are random there is no right answer to them."""

    models: dict[str, Transformer]
    prompts: list[list[int]]
    questions: list[Exercise] | None = None
    tokenizer: PreTrainedTokenizerFast | None = None


def measure_decoding(config: DecodingBenchmarkConfig, shape: ModelConfig, runtime: RuntimeConfig) -> list[Row]:
    """A row for each sampler, batch size and precision; `shape` is that of random weights.

    right: share of right answers, with its 95 % Wilson interval (None: random weights). passes: network calls per
    answer, those that it would take alone. tokens: per answer, up to EOS, that included. of ...: ratio to the tokens/s
    of the fastest of its kind at this batch size (None: not measured). ValueError for a checkpoint of another kind.
    """
    exam = trained(config, runtime) if config.checkpoints else random(config, shape, runtime)
    rows = []
    for batch_size in config.decoding_batch_sizes:
        batches = [exam.prompts[i : i + batch_size] for i in range(0, len(exam.prompts), batch_size)]
        cases = {}
        for dtype, (kind, model) in itertools.product(config.decoding_dtypes, exam.models.items()):
            precision, new_tokens = replace(runtime, dtype=dtype), config.decoding_new_tokens
            canvas_of = partial(Canvas.continuing, num_new=new_tokens, config=model.config, device=runtime.torch_device)
            for policy, decoder in decoders(config, kind, model, exam.questions is not None).items():
                cases[kind, policy, precision.dtype_name] = partial(answer, batches, canvas_of, decoder, precision)
        print(f"decoding: {len(cases)} samplers at batch size {batch_size}", file=sys.stderr, flush=True)
        timings = take_turns(cases, config.decoding_rounds, 1, runtime.torch_device)
        rows += compared([row_of(exam, name, batch_size, timing) for name, timing in timings.items()])
    return rows


def random(config: DecodingBenchmarkConfig, shape: ModelConfig, runtime: RuntimeConfig) -> Exam:
    """Models with random weights, and prompts without special tokens."""
    models = {}
    for kind, attention in ATTENTION.items():
        block_size = BLOCK_SIZE if attention == "block" else 0
        endless = replace(shape, attention=attention, block_size=block_size, eos_token_id=NO_EOS)
        models[kind] = Transformer(endless).to(runtime.torch_device).eval()
    size, ordinary = (config.decoding_questions, PROMPT_TOKENS), torch.arange(4, shape.vocab_size)
    drawn = torch.randint(len(ordinary), size, generator=torch.Generator().manual_seed(runtime.seed))
    return Exam(models, ordinary[drawn].tolist())


def trained(config: DecodingBenchmarkConfig, runtime: RuntimeConfig) -> Exam:
    """The checkpoints, and bundled questions."""
    tokenizer = load_tokenizer(config.decoding_tokenizer_dir)
    questions = sorted(
        (exercise for _, exercise in read_exercises(bundled_file("questions"), "questions")),
        key=lambda question: content_hash(f"{question.text}\n{question.reference}"),
    )[: config.decoding_questions]
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": question.text}], True) for question in questions]
    longest = max(map(len, prompts)) + config.decoding_new_tokens
    models = {}
    for kind, path in config.checkpoints.items():
        way = "autoregressive" if kind == "AR" else "diffusion"
        models[kind] = load_for_use(path, tokenizer, longest, runtime, way).model.eval()
        attention = models[kind].config.attention.replace("joint", "block")
        if attention != ATTENTION[kind]:
            raise ValueError(
                f"{path}, given as --decoding-{kind.lower()}, has {attention} attention, not {ATTENTION[kind]}"
            )
    return Exam(models, prompts, questions, tokenizer)


def decoders(config: DecodingBenchmarkConfig, kind: str, model: Transformer, is_trained: bool) -> dict[str, Decoder]:
    """The ways of decoding that are compared, by name."""

    def decoder(settings: SamplingConfig | DenoisingConfig) -> Decoder:
        return lambda canvas: fill(model, canvas, settings, range(len(canvas.ids)))

    if kind == "AR":
        return {"greedy, KV cache": decoder(GREEDY)}
    new_tokens, samplers = config.decoding_new_tokens, {}
    denoising = replace(DENOISING, gen_steps=new_tokens, gen_block_size=0 if kind == "diffusion" else None)
    for policy in config.decoding_policies:
        if policy == SELF_SPECULATIVE and model.config.attention != "joint":
            continue
        if policy not in (*THRESHOLDED, *ADAPTIVE):
            grid = SamplerGrid((policy,), steps=(math.ceil(new_tokens / TOKENS_PER_STEP),))
            samplers |= grid.samplers(denoising)
        elif is_trained:
            samplers |= SamplerGrid((policy,), thresholds=config.decoding_thresholds).samplers(denoising)
    cases = {name: decoder(settings) for name, settings in samplers.items()}
    return cases | ({NAIVE: partial(naive, model, num_steps=NAIVE_STEPS)} if kind == "diffusion" else {})


def answer(
    batches: list[list[list[int]]], canvas_of: Callable[..., Canvas], decoder: Decoder, runtime: RuntimeConfig
) -> list[Decoded]:
    with runtime.autocast():  # one for all batches: it casts the weights anew whenever it is entered
        return [decoder(canvas_of(prompts)) for prompts in batches]


@torch.no_grad()
def naive(model: Transformer, canvas: Canvas, num_steps: int) -> Decoded:
    """LLaDA's released sampler as it is mostly written, greedy, keeping the most confident: every step computes the
    logits of the whole canvas anew, and none is left out, whether or not it writes, and whatever has ended."""
    ids, masked, eos = canvas.ids.clone(), canvas.open.clone(), model.config.eos_token_id
    columns = torch.arange(ids.shape[1], device=ids.device)
    seen = (columns < canvas.lengths[:, None])[:, None, None] if int(canvas.lengths.min()) < ids.shape[1] else None
    new_tokens = int(masked[0].sum())
    quotas = transfer_schedule(new_tokens, num_steps)
    for quota in quotas + [0] * (num_steps - len(quotas)):
        logits = model(ids, attn_mask=seen).float()
        logits[..., model.config.mask_token_id] = -torch.inf
        tokens = logits.argmax(dim=-1)
        confidence = logits.softmax(dim=-1).gather(-1, tokens[..., None])[..., 0].masked_fill(~masked, -torch.inf)
        kept = torch.zeros_like(masked).scatter_(1, confidence.topk(quota, dim=1).indices, True)
        ids, masked = torch.where(kept, tokens, ids), masked & ~kept
    new = [row[blank].tolist() for row, blank in zip(ids.cpu(), canvas.open.cpu(), strict=True)]
    ended = [eos in tokens for tokens in new]
    new = [tokens[: tokens.index(eos) + 1] if end else tokens for tokens, end in zip(new, ended, strict=True)]
    return Decoded(ids.cpu(), new, ended, num_steps, [num_steps] * len(new))


def row_of(exam: Exam, name: tuple[str, str, str], batch_size: int, timing: Timing) -> Row:
    new = [tokens for decoded in timing.result for tokens in decoded.new]
    number, passes = len(new), sum(sum(decoded.row_passes) for decoded in timing.result)
    right = low = high = None
    if exam.questions is not None:
        texts = [decode(exam.tokenizer, tokens) for tokens in new]
        right = sum(is_correct(text, q.wanted, q.text) for text, q in zip(texts, exam.questions, strict=True)) / number
        low, high = wilson(right, number)
    tokens = sum(map(len, new))
    return {
        **dict(zip(("kind", "policy", "precision"), name, strict=True)),
        "batch": batch_size,
        "right": right,
        "right, low": low,
        "right, high": high,
        "passes": passes / number,
        "tokens": tokens / number,
        "ms per batch": 1000 * timing.median / len(timing.result),
        "spread": timing.spread,
        "tokens/s": tokens / timing.median,
    }


def compared(rows: list[Row]) -> list[Row]:
    """The rows of one batch size with the ratios of their tokens per second to those of the fastest baselines."""
    ar = max((row["tokens/s"] for row in rows if row["kind"] == "AR"), default=None)
    full = max((row["tokens/s"] for row in rows if row["policy"] == NAIVE), default=None)
    for row in rows:
        row["of AR"] = row["tokens/s"] / ar if ar else None
        row[f"of {NAIVE_STEPS} passes"] = row["tokens/s"] / full if full else None
    return rows
