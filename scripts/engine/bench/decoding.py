"""Speed of decoding: every sampler on the same questions, beside a KV-cached autoregressive model of the same size and
beside 64 forward passes over the whole canvas.

Without checkpoints the weights are random: nothing is then said of quality, no text ends, and diffusion has policies of
a fixed number of steps alone, since how sure random weights are says nothing about trained ones.
"""

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch

from dataset.corpus.bundled import bundled_file
from dataset.jsonl import content_hash
from dataset.tokenizer import PreTrainedTokenizerFast, decode, encode_chat, load_tokenizer
from model.config import ModelConfig
from model.decode import Canvas, Decoded, DenoisingConfig, SamplingConfig
from model.decode import decode as fill
from model.remasking import POLICIES, transfer_schedule
from model.transformer import Transformer
from scripts.engine.bench.timing import markdown, take_turns
from scripts.engine.decoding.samplers import ADAPTIVE, THRESHOLDED
from scripts.engine.loaded import load_for_use
from scripts.engine.report.exercises import read_exercises
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.statistics import is_correct, wilson

NAIVE_STEPS = 64
NAIVE = f"{NAIVE_STEPS} full forward passes"
ATTENTION = {"AR": "causal", "diffusion": "full", "blocks": "block"}  # of each kind of model
NO_EOS = -1  # an end that no token is
GREEDY = SamplingConfig(ar_temperature=0.0, ar_repeat_penalty=0.0)
UNCAPPED = DenoisingConfig(gen_temp=0.0, gen_repeat_penalty=0.0, gen_cap_start_ratio=1.0, gen_cap_end_ratio=1.0)


@dataclass(frozen=True)
class DecodingBenchmarkConfig:
    """Measuring decoding."""

    decoding_ar: Annotated[Path | None, "autoregressive checkpoint, fine-tuned (none of the three: random weights)"] = (
        None
    )
    decoding_diffusion: Annotated[Path | None, "checkpoint of full attention, fine-tuned"] = None
    decoding_blocks: Annotated[Path | None, "checkpoint of block diffusion, fine-tuned"] = None
    decoding_tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    decoding_questions: Annotated[
        int, "bundled questions, or random prompts, that every sampler answers", "at least 1"
    ] = 32
    decoding_batch_sizes: Annotated[tuple[int, ...], "questions answered together", "at least 1"] = (1, 8)
    decoding_dtypes: Annotated[
        tuple[Literal["auto", "float32", "float16", "bfloat16"], ...],
        "precisions tried; what a sampler is compared with is the fastest of all these",
    ] = ("auto",)
    decoding_new_tokens: Annotated[int, "longest answer, and the canvas of diffusion, in tokens", "at least 1"] = 24
    decoding_naive_tokens: Annotated[
        int | None,
        f"canvas of the {NAIVE_STEPS} full forward passes, in new tokens (none: --decoding-new-tokens)",
        "at least 1",
    ] = None
    decoding_policies: Annotated[tuple[Literal[*POLICIES], ...], "diffusion policies"] = tuple(POLICIES)
    decoding_thresholds: Annotated[tuple[float, ...], "of the policies threshold and hybrid", "in (0, 1]"] = (0.9, 0.7)
    decoding_tokens_per_step: Annotated[tuple[int, ...], "of policies with a fixed number of steps", "at least 1"] = (
        2,
    )
    decoding_prompt_tokens: Annotated[int, "length of a random prompt", "at least 1"] = 40
    decoding_block_size: Annotated[int, "block size of random weights", "at least 1"] = 8
    decoding_rounds: Annotated[int, "rounds, in each of which every sampler answers all questions", "at least 1"] = 5

    @property
    def checkpoints(self) -> dict[str, Path]:
        paths = {"AR": self.decoding_ar, "diffusion": self.decoding_diffusion, "blocks": self.decoding_blocks}
        return {kind: path for kind, path in paths.items() if path is not None}

    def samplers(self, kind: str, trained: bool) -> dict[str, SamplingConfig | DenoisingConfig]:
        """name -> settings."""
        if kind == "AR":
            return {"greedy, KV cache": GREEDY}
        samplers: dict[str, SamplingConfig | DenoisingConfig] = {}
        for policy in self.decoding_policies:
            config = replace(UNCAPPED, gen_remasking=policy, gen_steps=self.decoding_new_tokens)
            if kind == "diffusion":
                config = replace(config, gen_block_size=0)
            if policy in THRESHOLDED:
                names = {
                    f"{policy} {value:g}": {"gen_confidence_threshold": value} for value in self.decoding_thresholds
                }
            elif policy in ADAPTIVE:
                names = {f"{policy} {config.gen_factor:g}": {}}
            else:
                steps = {number: -(-self.decoding_new_tokens // number) for number in self.decoding_tokens_per_step}
                names = {f"{policy}, {number} per step": {"gen_steps": count} for number, count in steps.items()}
            if trained or policy not in (*THRESHOLDED, *ADAPTIVE):
                samplers |= {name: replace(config, **changes) for name, changes in names.items()}
        return samplers


class Exam(NamedTuple):
    """The prompts that every sampler answers; wanted answers and tokenizer are None if weights are random."""

    prompts: list[list[int]]
    wanted: list[str] | None = None
    tokenizer: PreTrainedTokenizerFast | None = None


def measure(config: DecodingBenchmarkConfig, shape: ModelConfig, runtime: RuntimeConfig) -> list[dict[str, Any]]:
    """A row for each sampler, batch size and dtype; `shape` is that of random weights.

    right, right_low, right_high: share of right answers and its 95 % Wilson interval (None: random weights). passes:
    network calls per answer, those that it would take alone. tokens: per answer, up to EOS, that included.
    tokens_per_second and latency_seconds, that of a batch: of the median round, `spread` being half the interquartile
    range of the rounds as a share of it. of_ar, of_naive: tokens_per_second over that of the fastest AR, and of the
    fastest full forward passes, at this batch size (None: not measured). ValueError for a checkpoint of another kind.
    """
    models, exam = _models_and_exam(config, shape, runtime)
    number, rows = len(exam.prompts), []
    for batch_size in config.decoding_batch_sizes:
        cases, turns = {}, {}
        for dtype, (kind, model) in itertools.product(config.decoding_dtypes, models.items()):
            precision = replace(runtime, dtype=dtype)
            for policy, case in _cases(config, kind, model, exam.wanted is not None).items():
                name = kind, policy, precision.dtype_name
                cases[name], turns[name] = case, partial(case.answer, exam.prompts, batch_size, precision)
        print(f"decoding: {len(cases)} samplers at batch size {batch_size}", file=sys.stderr, flush=True)
        timings = take_turns(turns, config.decoding_rounds, device=runtime.torch_device)
        of_size = []
        for name, timing in timings.items():
            row = dict(zip(("kind", "policy", "dtype"), name, strict=True))
            row |= {"batch_size": batch_size, **_figures(exam, cases[name].answers)}
            row["latency_seconds"] = timing.median / math.ceil(number / batch_size)
            row |= {"seconds": timing.median, "spread": timing.spread}
            row["tokens_per_second"] = row["tokens"] * number / timing.median
            of_size.append(row)
        rows += _compared(of_size)
    return rows


def _models_and_exam(
    config: DecodingBenchmarkConfig, shape: ModelConfig, runtime: RuntimeConfig
) -> tuple[dict[str, Transformer], Exam]:
    if config.checkpoints:
        return _trained(config, runtime)
    models = {}
    for kind, attention in ATTENTION.items():
        block_size = config.decoding_block_size if attention == "block" else 0
        random = replace(shape, attention=attention, block_size=block_size, eos_token_id=NO_EOS)
        models[kind] = Transformer(random).to(runtime.torch_device).eval()
    size, ordinary = (config.decoding_questions, config.decoding_prompt_tokens), torch.arange(4, shape.vocab_size)
    drawn = torch.randint(len(ordinary), size, generator=torch.Generator().manual_seed(runtime.seed))
    return models, Exam(ordinary[drawn].tolist())


def _trained(config: DecodingBenchmarkConfig, runtime: RuntimeConfig) -> tuple[dict[str, Transformer], Exam]:
    tokenizer = load_tokenizer(config.decoding_tokenizer_dir)
    questions = sorted(
        read_exercises(bundled_file("questions"), "questions"),
        key=lambda question: content_hash(f"{question.text}\n{question.reference}"),
    )[: config.decoding_questions]
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": question.text}], True) for question in questions]
    longest = max(map(len, prompts)) + max(config.decoding_new_tokens, config.decoding_naive_tokens or 0)
    models = {}
    for kind, path in config.checkpoints.items():
        models[kind] = load_for_use(path, tokenizer, longest, runtime).model.eval()
        attention = models[kind].config.attention
        if attention != ATTENTION[kind]:
            raise ValueError(
                f"{path}, given as --decoding-{kind.lower()}, has {attention} attention, not {ATTENTION[kind]}"
            )
    return models, Exam(prompts, [question.wanted for question in questions], tokenizer)


@dataclass
class Case:
    """A decoder, which writes into a canvas of so many new tokens; called, it answers all prompts."""

    model: Transformer
    decoder: Callable[[Canvas], Decoded]
    new_tokens: int
    answers: list[Decoded] = field(default_factory=list)  # the last ones

    def answer(self, prompts: list[list[int]], batch_size: int, runtime: RuntimeConfig) -> None:
        self.answers.clear()
        with runtime.autocast():  # one for all batches: it casts the weights anew whenever it is entered
            for i in range(0, len(prompts), batch_size):
                batch = prompts[i : i + batch_size]
                canvas = Canvas.continuing(batch, self.new_tokens, self.model.config, runtime.torch_device)
                self.answers.append(self.decoder(canvas))


def _cases(config: DecodingBenchmarkConfig, kind: str, model: Transformer, trained: bool) -> dict[str, Case]:
    def decoder(settings: SamplingConfig | DenoisingConfig) -> Callable[[Canvas], Decoded]:
        return lambda canvas: fill(model, canvas, settings, range(len(canvas.ids)))

    samplers = config.samplers(kind, trained)
    cases = {name: Case(model, decoder(settings), config.decoding_new_tokens) for name, settings in samplers.items()}
    if kind == "diffusion":
        new_tokens = config.decoding_naive_tokens or config.decoding_new_tokens
        cases[NAIVE] = Case(model, lambda canvas: naive(model, canvas, NAIVE_STEPS), new_tokens)
    return cases


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


def _figures(exam: Exam, answers: list[Decoded]) -> dict[str, Any]:
    new = [tokens for decoded in answers for tokens in decoded.new]
    number, passes = len(new), sum(sum(decoded.row_passes) for decoded in answers)
    right = low = high = None
    if exam.wanted is not None:
        texts = [decode(exam.tokenizer, tokens) for tokens in new]
        right = sum(map(is_correct, texts, exam.wanted)) / number
        low, high = wilson(right, number)
    tokens = sum(map(len, new)) / number
    return {"right": right, "right_low": low, "right_high": high, "passes": passes / number, "tokens": tokens}


def _compared(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of one batch size with the ratios of their tokens per second to those of the fastest baselines."""
    ar = max((row["tokens_per_second"] for row in rows if row["kind"] == "AR"), default=None)
    full = max((row["tokens_per_second"] for row in rows if row["policy"] == NAIVE), default=None)
    for row in rows:
        row["of_ar"] = row["tokens_per_second"] / ar if ar else None
        row["of_naive"] = row["tokens_per_second"] / full if full else None
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, a line for each sampler, batch size and dtype."""
    columns = {
        "model": lambda row: row["kind"],
        "policy": lambda row: row["policy"],
        "batch": lambda row: row["batch_size"],
        "dtype": lambda row: row["dtype"],
        "right": _right,
        "passes per answer": lambda row: f"{row['passes']:.1f}",
        "tokens per answer": lambda row: f"{row['tokens']:.1f}",
        "ms per batch": lambda row: f"{row['latency_seconds'] * 1e3:.1f} +- {100 * row['spread']:.0f} %",
        "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
        "of AR's": lambda row: "-" if row["of_ar"] is None else f"{row['of_ar']:.2f}",
        f"of {NAIVE}": lambda row: "-" if row["of_naive"] is None else f"{row['of_naive']:.2f}",
    }
    note = "Greedy; the ratios are to the fastest of their kind at that batch size."
    if any(row["right"] is None for row in rows):
        note += " Random weights: only the cost of a pass means anything, so policies that stop early are left out."
    return f"{markdown(rows, columns)}\n\n{note}"


def _right(row: dict[str, Any]) -> str:
    return "-" if row["right"] is None else "{right:.3f} [{right_low:.3f}, {right_high:.3f}]".format(**row)
