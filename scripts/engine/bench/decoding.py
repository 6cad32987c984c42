"""Speed of decoding: every sampler on the same questions, beside a KV-cached autoregressive model of the same size and
beside 64 forward passes over the whole canvas.

Without checkpoints the weights are random: nothing is then said of quality, no text ends, and diffusion has policies of
a fixed number of steps alone, since how sure random weights are says nothing about trained ones.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from dataset.corpus.bundled import bundled_file
from dataset.jsonl import content_hash
from dataset.tokenizer import PreTrainedTokenizerFast, decode, encode_chat, load_tokenizer
from model.config import ModelConfig
from model.decode import Canvas, Decoded, DenoisingConfig, SamplingConfig
from model.decode import decode as fill
from model.remasking import POLICIES, transfer_schedule
from model.transformer import Transformer
from scripts.engine.bench.timing import interleave
from scripts.engine.decoding.samplers import ADAPTIVE, THRESHOLDED
from scripts.engine.loaded import load_for_use
from scripts.engine.report.measure import read_asked
from scripts.engine.runtime import RuntimeConfig
from scripts.engine.statistics import is_correct, wilson

NAIVE_STEPS = 64
KINDS = {"AR": "causal", "diffusion": "full", "blocks": "block"}  # and the attention each was trained with
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
    decoding_questions: Annotated[int, "bundled questions, or random prompts, that every sampler answers"] = 32
    decoding_batch_sizes: Annotated[tuple[int, ...], "questions answered together"] = (1, 8)
    decoding_dtypes: Annotated[
        tuple[str, ...], "precisions tried; what a sampler is compared with is the fastest of all these"
    ] = ("auto",)
    decoding_new_tokens: Annotated[int, "longest answer, and the canvas of diffusion, in tokens"] = 24
    decoding_naive_tokens: Annotated[
        int | None, f"canvas of the {NAIVE_STEPS} full forward passes, in new tokens (none: --decoding-new-tokens)"
    ] = None
    decoding_policies: Annotated[tuple[str, ...], "diffusion policies"] = tuple(POLICIES)
    decoding_thresholds: Annotated[tuple[float, ...], "of the policies threshold and hybrid"] = (0.9, 0.7)
    decoding_tokens_per_step: Annotated[tuple[int, ...], "of policies with a fixed number of steps"] = (2,)
    decoding_prompt_tokens: Annotated[int, "length of a random prompt"] = 40
    decoding_block_size: Annotated[int, "block size of random weights"] = 8
    decoding_rounds: Annotated[int, "rounds, in each of which every sampler answers all questions"] = 5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            values = [value] if isinstance(value, int) else value if name.endswith(("sizes", "per_step")) else []
            if not all(isinstance(one, int) and one > 0 for one in values):
                raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if unknown := [name for name in self.decoding_policies if name not in POLICIES]:
            raise ValueError(f"--decoding-policies: {unknown[0]!r} is not one of {', '.join(POLICIES)}")
        if unknown := [name for name in self.decoding_dtypes if name not in ("auto", "float32", "float16", "bfloat16")]:
            raise ValueError(f"--decoding-dtypes: {unknown[0]!r} is none; expected auto, float32, float16 or bfloat16")
        list(self.samplers("diffusion", True))

    @property
    def checkpoints(self) -> dict[str, Path]:
        paths = {"AR": self.decoding_ar, "diffusion": self.decoding_diffusion, "blocks": self.decoding_blocks}
        return {kind: path for kind, path in paths.items() if path is not None}

    def samplers(self, kind: str, trained: bool) -> dict[str, SamplingConfig | DenoisingConfig]:
        """name -> settings. ValueError for an impossible threshold."""
        if kind == "AR":
            return {"greedy, KV cache": GREEDY}
        found: dict[str, SamplingConfig | DenoisingConfig] = {}
        for policy in self.decoding_policies:
            config = replace(UNCAPPED, gen_remasking=policy, gen_steps=self.decoding_new_tokens)
            if kind == "diffusion":
                config = replace(config, gen_block_size=0)
            if policy in ADAPTIVE or policy in THRESHOLDED:
                values = self.decoding_thresholds if policy in THRESHOLDED else (config.gen_factor,)
                field = "gen_confidence_threshold" if policy in THRESHOLDED else "gen_factor"
                found |= {f"{policy} {v:g}": replace(config, **{field: v}) for v in values if trained}
            else:
                for number in self.decoding_tokens_per_step:
                    steps = -(-self.decoding_new_tokens // number)
                    found[f"{policy}, {number} per step"] = replace(config, gen_steps=steps)
        return found


class Exam(NamedTuple):
    """What every sampler is given; wanted answers are None where weights are random."""

    prompts: list[list[int]]
    wanted: list[str] | None
    tokenizer: PreTrainedTokenizerFast | None


def measure(config: DecodingBenchmarkConfig, shape: ModelConfig, runtime: RuntimeConfig) -> list[dict[str, Any]]:
    """A row for each sampler, batch size and dtype; `shape` is that of random weights.

    right, right_low, right_high: share of right answers and its 95 % Wilson interval (None: random weights). passes:
    network calls per answer, those that it would take alone. tokens: per answer, up to EOS, that included.
    tokens_per_second and latency_seconds, that of a batch: of the median round, `spread` being half the interquartile
    range of the rounds as a share of it. of_ar, of_naive: tokens_per_second over that of the fastest AR, and of the
    fastest full forward passes, at this batch size (None: not measured). ValueError for a checkpoint of another kind.
    """
    models, exam = _set_up(config, shape, runtime)
    rows = []
    for batch_size in config.decoding_batch_sizes:
        cases, answers = {}, {}
        for dtype in config.decoding_dtypes:
            at = replace(runtime, dtype=dtype)
            for kind, model in models.items():
                for policy, decoder in _decoders(config, kind, model, exam.wanted is not None).items():
                    name = kind, policy, str(at.torch_dtype).removeprefix("torch.")
                    answers[name] = []
                    cases[name] = _case(decoder, exam.prompts, batch_size, at, answers[name])
        print(f"decoding: {len(cases)} samplers at batch size {batch_size}", file=sys.stderr, flush=True)
        timings = interleave(cases, config.decoding_rounds, device=runtime.torch_device)
        batches = -(-len(exam.prompts) // batch_size)
        made = [
            dict(zip(("kind", "policy", "dtype"), name, strict=True))
            | {"batch_size": batch_size, **_figures(exam, answers[name])}
            | {"latency_seconds": timing.median / batches, "seconds": timing.median, "spread": timing.spread}
            for name, timing in timings.items()
        ]
        rows += _compared(made, len(exam.prompts))
    return rows


def _set_up(
    config: DecodingBenchmarkConfig, shape: ModelConfig, runtime: RuntimeConfig
) -> tuple[dict[str, Transformer], Exam]:
    if not config.checkpoints:
        shape = replace(shape, eos_token_id=NO_EOS)
        sizes = {"causal": 0, "full": 0, "block": config.decoding_block_size}
        models = {
            kind: Transformer(replace(shape, attention=attention, block_size=sizes[attention]))
            for kind, attention in KINDS.items()
        }
        drawn = torch.Generator().manual_seed(runtime.seed)
        size = config.decoding_questions, config.decoding_prompt_tokens
        others = torch.arange(4, shape.vocab_size)
        prompts = others[torch.randint(len(others), size, generator=drawn)].tolist()
        return {kind: model.to(runtime.torch_device).eval() for kind, model in models.items()}, Exam(
            prompts, None, None
        )
    tokenizer = load_tokenizer(config.decoding_tokenizer_dir)
    asked = sorted(
        read_asked(bundled_file("questions"), "questions"), key=lambda one: content_hash(f"{one.text}\n{one.reference}")
    )[: config.decoding_questions]
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": one.text}], True) for one in asked]
    longest = max(map(len, prompts)) + max(config.decoding_new_tokens, config.decoding_naive_tokens or 0)
    models = {}
    for kind, path in config.checkpoints.items():
        models[kind] = load_for_use(path, tokenizer, longest, runtime).model.eval()
        if models[kind].config.attention != KINDS[kind]:
            found = models[kind].config.attention
            raise ValueError(f"{path}, given as --decoding-{kind.lower()}, has {found} attention, not {KINDS[kind]}")
    return models, Exam(prompts, [one.wanted for one in asked], tokenizer)


Decoder = Callable[[list[list[int]], torch.device], Decoded]  # prompts -> their answers


def _decoders(config: DecodingBenchmarkConfig, kind: str, model: Transformer, trained: bool) -> dict[str, Decoder]:
    def sampler(settings: SamplingConfig | DenoisingConfig) -> Decoder:
        def decoder(prompts: list[list[int]], device: torch.device) -> Decoded:
            canvas = Canvas.continuing(prompts, config.decoding_new_tokens, model.config, device)
            return fill(model, canvas, settings, range(len(prompts)))

        return decoder

    def full_passes(prompts: list[list[int]], device: torch.device) -> Decoded:
        new_tokens = config.decoding_naive_tokens or config.decoding_new_tokens
        return naive(model, Canvas.continuing(prompts, new_tokens, model.config, device), NAIVE_STEPS)

    found = {name: sampler(settings) for name, settings in config.samplers(kind, trained).items()}
    return found | ({_NAIVE: full_passes} if kind == "diffusion" else {})


_NAIVE = f"{NAIVE_STEPS} full forward passes"


def _case(
    decoder: Decoder, prompts: list[list[int]], batch_size: int, runtime: RuntimeConfig, made: list[Decoded]
) -> Callable[[], None]:
    def case() -> None:
        made.clear()
        with runtime.autocast():  # one for all: it casts the weights anew whenever it is entered
            for first in range(0, len(prompts), batch_size):
                made.append(decoder(prompts[first : first + batch_size], runtime.torch_device))

    return case


@torch.no_grad()
def naive(model: Transformer, canvas: Canvas, num_steps: int) -> Decoded:
    """LLaDA's released sampler as it is mostly written, greedy, keeping the most confident: every step computes the
    logits of the whole canvas anew, and none is left out, whether or not it writes, and whatever has ended."""
    ids, masked = canvas.ids.clone(), canvas.open.clone()
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
    return _up_to_eos(ids.cpu(), canvas.open.cpu(), model.config.eos_token_id, num_steps)


def _up_to_eos(ids: Tensor, opened: Tensor, eos: int, passes: int) -> Decoded:
    new = [row[blank].tolist() for row, blank in zip(ids, opened, strict=True)]
    ended = [eos in tokens for tokens in new]
    new = [tokens[: tokens.index(eos) + 1] if end else tokens for tokens, end in zip(new, ended, strict=True)]
    return Decoded(ids, new, ended, passes, [passes] * len(new))


def _figures(exam: Exam, made: list[Decoded]) -> dict[str, Any]:
    new = [tokens for decoded in made for tokens in decoded.new]
    number, passes = len(new), sum(sum(decoded.row_passes) for decoded in made)
    right = low = high = None
    if exam.wanted is not None:
        texts = [decode(exam.tokenizer, tokens) for tokens in new]
        right = sum(map(is_correct, texts, exam.wanted)) / number
        low, high = wilson(right, number)
    return {
        "right": right,
        "right_low": low,
        "right_high": high,
        "passes": passes / number,
        "tokens": sum(map(len, new)) / number,
    }


def _compared(rows: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """The rows of one batch size, `number` answers in each, with their tokens per second and its ratios."""
    rows = [row | {"tokens_per_second": row["tokens"] * number / row["seconds"]} for row in rows]
    fastest = {
        name: max((row["tokens_per_second"] for row in rows if chosen(row)), default=None)
        for name, chosen in (("of_ar", lambda row: row["kind"] == "AR"), ("of_naive", lambda r: r["policy"] == _NAIVE))
    }
    return [
        row | {name: row["tokens_per_second"] / best if best else None for name, best in fastest.items()}
        for row in rows
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| model | policy | batch | dtype | right | passes per answer | tokens per answer | ms per batch | tokens/s "
        f"| of AR's | of {_NAIVE} |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        right = "-" if row["right"] is None else "{right:.3f} [{right_low:.3f}, {right_high:.3f}]".format(**row)
        ratios = ["-" if row[name] is None else f"{row[name]:.2f}" for name in ("of_ar", "of_naive")]
        cells = [row["kind"], row["policy"], row["batch_size"], row["dtype"], right, f"{row['passes']:.1f}"]
        cells += [f"{row['tokens']:.1f}", f"{row['latency_seconds'] * 1e3:.1f} +- {100 * row['spread']:.0f} %"]
        lines.append("| " + " | ".join(map(str, [*cells, f"{row['tokens_per_second']:,.0f}", *ratios])) + " |")
    note = "Greedy; the ratios are to the fastest of their kind at that batch size."
    if any(row["right"] is None for row in rows):
        note += " Random weights: only the cost of a pass means anything, so policies that stop early are left out."
    return "\n".join([*lines, "", note])
