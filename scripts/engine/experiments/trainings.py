"""The experiments that train: mask schedules, initialisation, repetition.

Each returns its runs, one record for each training and seed, with the measurements of its weights; all likelihoods are
of the same held-out documents. To add one: a group of flags, a function, and an entry in `TRAININGS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Annotated, Any, NamedTuple

from dataset.reading.documents import read_documents
from dataset.tokenizer import encode
from model.decoding.decode import ContinuationConfig
from model.decoding.denoiser import DenoisingConfig
from scripts.engine.decoding.generation import generate_batch
from scripts.engine.experiments.runs import Lab, Run, Training, write_documents
from scripts.engine.files import sha256_of
from scripts.engine.likelihood.documents import window_nats
from scripts.engine.likelihood.windows import DataEvalConfig, Window
from scripts.engine.prompts import Prompt
from scripts.engine.statistics import distinct, t_interval

Record = dict[str, Any]
Records = list[Record]
JUDGE_SEED = 10_000  # no other training has it
SECOND_STAGE = 5_000  # added to the seed, so that a second stage does not see the rows of the first one again
ROWS_PER_BATCH = 128
UNNAMED = {"value", "minus", "mean", "low", "high", "n", "unit"}  # fields of a summary that identify no cell


@dataclass(frozen=True)
class SchedulesConfig:
    """schedules: mask schedules compared."""

    schedules_start_tokens: Annotated[int, "tokens of the AR training from which all start", "at least 1"] = 800_000
    schedules_tokens: Annotated[int, "tokens of each diffusion training", "at least 1"] = 1_600_000
    schedules_band: Annotated[
        tuple[float, ...], "least and largest mask rate of the banded training", "in [0, 1]", "rising"
    ] = (0.3, 0.8)
    schedules_judge_tokens: Annotated[int, "tokens of the AR training that judges generated texts", "at least 1"] = (
        3_000_000
    )
    schedules_generations: Annotated[int, "texts generated from a fully masked row and judged", "at least 1"] = 128

    def __post_init__(self):
        if len(self.schedules_band) != 2:
            raise ValueError(f"--schedules-band {','.join(map(str, self.schedules_band))}: expected two rates")


@dataclass(frozen=True)
class InitialisationConfig:
    """initialisation: AR weights or none at equal tokens."""

    initialisation_tokens: Annotated[
        tuple[int, ...], "total tokens, AR and diffusion together, of each point", "at least 1", "rising"
    ] = (500_000, 1_000_000, 2_000_000)
    initialisation_shares: Annotated[
        tuple[float, ...], "shares of them spent on the AR training (0 = from scratch)", "in [0, 1)", "rising"
    ] = (0.0, 0.5)


@dataclass(frozen=True)
class RepetitionConfig:
    """repetition: one small corpus seen again and again."""

    repetition_tokens: Annotated[int, "tokens of the small corpus, rounded down to full steps", "at least 1"] = 65_536
    repetition_counts: Annotated[tuple[int, ...], "how often it is seen", "at least 1", "rising"] = (1, 4, 16, 64)
    repetition_batch_size: Annotated[int, "rows per step", "at least 1"] = 32


def schedules(lab: Lab, config: SchedulesConfig, seeds: Sequence[int]) -> Record:
    """Four ways to mask, from one AR start per seed: the bound, and a judge's view of texts generated from nothing.

    Texts are drawn by any-order ancestral sampling from a canvas of masks after BOS: one token per step, at a random
    place, temperature 1, nothing cut off. That samples from the model itself. judge_nats: nats per token, EOS included,
    under an AR model that was trained longer; low nats at low distinct_2 mean loops.
    """
    least, most = map(str, config.schedules_band)
    ways = {
        "1/t": ("--mask-schedule", "iid_t"),
        "fixed count": ("--mask-schedule", "fixed_count"),
        "uniform": ("--mask-schedule", "random"),
        f"band {least}-{most}": (
            *("--mask-schedule", "fixed_count"),
            *("--mask-rate-min", least, "--mask-rate-max", most),
        ),
    }
    steps = lab.recipe.steps(config.schedules_tokens, "--schedules-tokens")
    first_steps = lab.recipe.steps(config.schedules_start_tokens, "--schedules-start-tokens")
    judge_steps = lab.recipe.steps(config.schedules_judge_tokens, "--schedules-judge-tokens")
    judge = lab.train(Training("schedules_judge", "ar", judge_steps, JUDGE_SEED))
    runs: Records = []
    for seed in seeds:
        start = lab.train(Training(f"schedules_start_{seed}", "ar", first_steps, seed))
        for number, (way, flags) in enumerate(ways.items()):
            training = Training(f"schedules_{number}_{seed}", "diffusion", steps, seed + SECOND_STAGE, flags, start)
            run = lab.train(training)
            record = {"schedule": way, "seed": seed, "tokens": start.tokens + run.tokens}
            runs.append(record | lab.likelihood(run.weights) | judged(lab, run, judge, config))
    return {"runs": runs, "judge": lab.likelihood(judge.weights), "real_text": judged(lab, None, judge, config)}


def judged(lab: Lab, run: Run | None, judge: Run, config: SchedulesConfig) -> Record:
    """judge_nats and distinct_2 of texts that the run's model generates; without a run, of held-out documents, cut to
    the same length."""
    count, room = config.schedules_generations, lab.recipe.max_seq_len - 1

    def measure() -> Record:
        texts = generated(lab, run, count, room) if run else held_out(lab, count, room)
        bos, eos = [lab.tokenizer.bos_token_id], [lab.tokenizer.eos_token_id]
        rows = [bos + ids + eos * ended for ids, ended in texts]
        windows = [Window(i, ids[: room + 1], i) for i, ids in enumerate(rows) if len(ids) > 1]
        nats, _ = window_nats(lab.load(judge.weights), windows, DataEvalConfig())
        tokens = sum(len(window.ids) - 1 for window in windows)
        return {
            "judge_nats": float(nats.sum()) / tokens,
            "distinct_2": distinct([ids for ids, _ in texts], 2),
            "tokens_per_text": tokens / len(windows),
        }

    settings = {"generations": count, "length": room, "judge_sha256": sha256_of(judge.weights)}
    return lab.remember(run.weights if run else judge.weights, "judged", settings, measure)


def generated(lab: Lab, run: Run, count: int, room: int) -> list[tuple[list[int], bool]]:
    """(ids as the tokenizer spells the text, whether it ended) of `count` texts; text i has the seed i."""
    sampler = DenoisingConfig(
        gen_steps=room, gen_block_size=0, gen_remasking="random", gen_temp=1.0, gen_top_k=0, gen_repeat_penalty=0.0
    )
    loaded, generations = lab.load(run.weights), []
    for first in range(0, count, ROWS_PER_BATCH):
        prompts = [Prompt("")] * min(ROWS_PER_BATCH, count - first)
        generations += generate_batch(loaded, prompts, ContinuationConfig(room, gen_seed=first), sampler)
    return [(encode(lab.tokenizer, generation.text), generation.ended) for generation in generations]


def held_out(lab: Lab, count: int, room: int) -> list[tuple[list[int], bool]]:
    """The same of the first held-out documents."""
    texts = [encode(lab.tokenizer, text) for text in read_documents(lab.heldout)][:count]
    return [(ids[:room], len(ids) < room) for ids in texts]


def initialisation(lab: Lab, config: InitialisationConfig, seeds: Sequence[int]) -> Record:
    """A share of the tokens for AR training and the rest for diffusion, each with its own learning-rate schedule."""
    runs: Records = []
    for seed in seeds:
        for tokens in config.initialisation_tokens:
            steps = lab.recipe.steps(tokens, "--initialisation-tokens")
            for share in config.initialisation_shares:
                first_steps, name, start = round(steps * share), f"initialisation_{tokens}_{share:g}_{seed}", None
                if share:
                    if not first_steps:
                        raise ValueError(f"--initialisation-shares {share:g} of {steps} steps is none; raise it")
                    start = lab.train(Training(f"{name}_ar", "ar", first_steps, seed))
                run = lab.train(Training(name, "diffusion", steps - first_steps, seed + SECOND_STAGE, start=start))
                seen = run.tokens + (start.tokens if start else 0)
                record = {"ar_share": share, "budget": tokens, "seed": seed, "tokens": seen}
                runs.append(record | lab.likelihood(run.weights))
    return {"runs": runs}


def repetition(lab: Lab, config: RepetitionConfig, seeds: Sequence[int]) -> Record:
    """A small corpus seen R times by each kind, every run with its own learning-rate schedule: the `final` weights, and
    the `best` by other held-out documents. The corpus fills whole steps, so that R passes take R times as many."""
    recipe = replace(lab.recipe, batch_size=config.repetition_batch_size)
    steps = recipe.steps(config.repetition_tokens, "--repetition-tokens")
    rows = steps * recipe.batch_size
    texts = lab.small_corpus(rows, recipe.max_seq_len)
    small = write_documents(lab.folder / "small.jsonl", [*texts, *lab.selection])
    runs: Records = []
    for seed in seeds:
        for count in config.repetition_counts:
            every = "--eval-interval", str(max(count * steps // 10, 1))
            for kind in ("ar", "diffusion"):
                name = f"repetition_{kind}_{count}_{seed}"
                run = lab.train(Training(name, kind, count * steps, seed, every, data=small, recipe=recipe))
                for weights, path in (("final", run.weights), ("best", run.best)):
                    record = {"kind": kind, "repetitions": count, "weights": weights, "seed": seed}
                    runs.append(record | {"tokens": run.tokens} | lab.likelihood(path))
    return {"runs": runs, "small_corpus": {"documents": len(texts), "rows": rows}}


# -- means and differences over seeds ----------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """The comparison of an experiment's runs."""

    by: tuple[str, ...]  # fields that identify a cell; within a cell only the seed differs
    values: tuple[str, ...]  # measured
    contrast: str  # one of `by`: the other levels of this field are compared with its first, all else equal


def summarise(runs: Sequence[Record], comparison: Comparison) -> Records:
    """For every value and cell the mean over the seeds, and in a second record, with `minus`, the mean difference from
    the first level of the contrast, seed by seed."""
    cells: dict[tuple, Records] = {}
    for run in runs:
        cells.setdefault(tuple(run[name] for name in comparison.by), []).append(run)
    place = comparison.by.index(comparison.contrast)
    first = next(iter(cells))[place]
    summary = []
    for value in comparison.values:
        for key, members in cells.items():
            cell = {"value": value, **dict(zip(comparison.by, key, strict=True))}
            summary.append(cell | over_seeds([run[value] for run in members]))
            if key[place] != first:
                base = {run["seed"]: run[value] for run in cells[(*key[:place], first, *key[place + 1 :])]}
                differences = [run[value] - base[run["seed"]] for run in members]
                summary.append(cell | {"minus": first} | over_seeds(differences))
    return summary


def over_seeds(values: Sequence[float]) -> Record:
    """Mean and 95 % t interval of one value per seed."""
    low, high = t_interval(values)
    return {"mean": fmean(values), "low": low, "high": high, "n": len(values), "unit": "seeds"}


def lines(summary: Sequence[Record]) -> list[str]:
    """The summary of an experiment, one sentence per record."""
    sentences = []
    for row in summary:
        cell = {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in row.items() if key not in UNNAMED}
        name = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in cell.items())
        minus = f", minus that of {row['minus']}" if "minus" in row else ""
        spread = "" if row["low"] is None else f" ({row['low']:.4f} to {row['high']:.4f})"
        sentences.append(f"{row['value']}, {name}{minus}: {row['mean']:.4f}{spread}, {row['n']} {row['unit']}")
    return sentences


# -- experiments -------------------------------------------------------------------------------------------------------


class Experiment(NamedTuple):
    """An experiment that trains."""

    run: Callable[[Lab, Any, Sequence[int]], Record]  # (lab, its group of flags, seeds) -> {"runs": ..., ...}
    comparison: Comparison


TRAININGS = {
    "schedules": Experiment(
        schedules, Comparison(("schedule",), ("nats_per_token", "judge_nats", "distinct_2"), "schedule")
    ),
    "initialisation": Experiment(initialisation, Comparison(("budget", "ar_share"), ("nats_per_token",), "ar_share")),
    "repetition": Experiment(repetition, Comparison(("weights", "repetitions", "kind"), ("nats_per_token",), "kind")),
}
