"""Quality against cost: every way of decoding on the same questions, for the report's frontier."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple

from tqdm import tqdm

from model.decoding.autoregressive import SamplingConfig
from model.decoding.denoiser import REMASKING, SELF_SPECULATIVE, DenoisingConfig
from scripts.engine.decoding.answers import Answer, answer_batch, seeded_at
from scripts.engine.decoding.generation import warm_up
from scripts.engine.decoding.samplers import ADAPTIVE
from scripts.engine.flags import in_effect
from scripts.engine.loaded import Loaded
from scripts.engine.report.measure import ANSWERED, IN_WORDS, Section, Setup, recorded

OF_DIFFUSION = "with a frontier of a diffusion model"
STEPPED = tuple(policy for policy in REMASKING if policy not in ADAPTIVE)


@dataclass(frozen=True)
class FrontierConfig:
    """Quality against cost, of the first model of each kind and block size."""

    frontier_questions: Annotated[
        int,
        "answered with every policy and setting: the first of the first file with right and wrong answers (questions, "
        "poems), else of the first one of open questions; 0 = none",
        "at least 0",
        f"with {IN_WORDS}",
    ] = 200
    frontier_policies: Annotated[
        tuple[Literal[*REMASKING], ...],
        "policies of diffusion; self_speculative is that of joint checkpoints alone",
        OF_DIFFUSION,
    ] = REMASKING
    frontier_steps: Annotated[
        tuple[int, ...] | None,
        "step counts (none: an eighth, a quarter, half and all of --max-new-tokens)",
        "at least 1",
        OF_DIFFUSION,
        f"with --frontier-policies {', '.join(STEPPED[:-1])} or {STEPPED[-1]}",
    ] = None
    frontier_thresholds: Annotated[
        tuple[float, ...], "of the policy threshold", "in (0, 1]", OF_DIFFUSION, "with --frontier-policies threshold"
    ] = (0.5, 0.7, 0.9)
    frontier_factors: Annotated[
        tuple[float, ...], "of the policy factor", "above 0", OF_DIFFUSION, "with --frontier-policies factor"
    ] = (0.5, 1.0, 2.0)
    frontier_entropy_bounds: Annotated[
        tuple[float, ...],
        "of the policy entropy_bound",
        "at least 0",
        OF_DIFFUSION,
        "with --frontier-policies entropy_bound",
    ] = (0.1, 0.3, 1.0)


class Sampler(NamedTuple):
    """A way of decoding."""

    policy: str
    setting: str
    config: SamplingConfig | DenoisingConfig


def samplers(
    frontier: FrontierConfig, config: SamplingConfig | DenoisingConfig, max_new_tokens: int, joint: bool = True
) -> Iterator[Sampler]:
    """AR: with the settings of the command, and greedy; diffusion: every policy with each of its settings, that of
    joint weights only for those."""
    if isinstance(config, SamplingConfig):
        if config.ar_temperature:
            yield Sampler("AR", f"temperature {config.ar_temperature:g}", config)
        yield Sampler("AR", "greedy", replace(config, ar_temperature=0.0))
        return
    steps = frontier.frontier_steps or sorted({max(1, max_new_tokens // part) for part in (8, 4, 2, 1)})
    varied = {  # by which setting a policy without a schedule is varied
        "threshold": ("gen_confidence_threshold", frontier.frontier_thresholds),
        "factor": ("gen_factor", frontier.frontier_factors),
        "entropy_bound": ("gen_entropy_bound", frontier.frontier_entropy_bounds),
    }
    for policy in frontier.frontier_policies:
        if policy == SELF_SPECULATIVE:
            if joint and config.gen_eos != "confidence":
                setting = f"temperature {config.gen_temp:g}" if config.gen_temp else "greedy"
                yield Sampler(policy, setting, replace(config, gen_remasking=policy))
            continue
        field, values = varied.get(policy, ("gen_steps", steps))
        for value in values:
            way = replace(config, gen_remasking=policy, **{field: value})
            setting = number_of_steps(policy, value) if field == "gen_steps" else f"{value:g}"
            if policy == "hybrid":  # has a threshold, too
                setting = f"{way.gen_confidence_threshold:g}, {setting}"
            yield Sampler(policy, setting, way)


def require_joint(frontier: FrontierConfig, config: DenoisingConfig, models: Iterable[Loaded]) -> None:
    """Raise ValueError if self-speculation was asked for, and no model can do it so."""
    if SELF_SPECULATIVE in frontier.frontier_policies:
        joint = [loaded for loaded in models if _is_joint(loaded)]
        if not joint:
            raise ValueError(
                f"--frontier-policies {SELF_SPECULATIVE} is for joint weights, and no --diffusion-checkpoint has them; "
                "leave it out"
            )
        replace(config, gen_remasking=SELF_SPECULATIVE).fitted(joint[0].model.config)


def _is_joint(loaded: Loaded) -> bool:
    """Return whether joint weights are used as a diffusion model."""
    return loaded.model.config.attention == "joint"


def number_of_steps(policy: str, steps: int) -> str:
    """Describe --gen-steps of a policy with a schedule; hybrid may need fewer."""
    return f"{'at most ' if policy == 'hybrid' else ''}{steps} {'step' if steps == 1 else 'steps'}"


def choose(sections: list[Section]) -> Section | None:
    """The first file with right and wrong answers, else the first that is answered at all."""
    answered = [section for section in sections if section["format"] in ANSWERED]
    return next((section for section in answered if section["format"] != "open"), next(iter(answered), None))


def measure_frontier(setup: Setup, config: FrontierConfig, section: Section) -> dict[str, Any]:
    """Every sampler's answers to the first items of the section, which are a random sample of it.

    A question is answered by all samplers before the next one is, so that whatever else the machine does slows down all
    of them alike.
    """
    items, batch_size = section["items"][: config.frontier_questions], setup.config.batch_size or 1
    models: dict[str, str] = {}  # the first of each kind and block size
    for name, loaded in setup.models.items():
        models.setdefault(loaded.described, name)
    length = setup.continuation.max_new_tokens
    ways = {
        name: list(samplers(config, setup.sampler(name), length, _is_joint(setup.models[name])))
        for name in models.values()
    }
    ways = {name: some for name, some in ways.items() if some}  # nothing but self-speculation was asked for
    answers: dict[str, list[list[Answer]]] = {name: [[] for _ in ways[name]] for name in ways}
    for first in tqdm(range(0, len(items), batch_size), desc="frontier", disable=not sys.stderr.isatty()):
        for name in ways:
            loaded = setup.models[name]
            batch = items[first : first + batch_size]
            prompts = [setup.prompting.prompt(item["question"], loaded) for item in batch]
            continuation = seeded_at(loaded, setup.continuation, first, len(items))  # item i has the seed plus i
            warm_up(loaded, prompts, continuation, ways[name][0].config)
            for way, written in zip(ways[name], answers[name], strict=True):
                written += answer_batch(loaded, prompts, continuation, way.config)
    points = [
        {
            "model": name,
            "policy": way.policy,
            "setting": way.setting,
            "config": in_effect(way.config),
            "results": recorded(setup, written),
        }
        for name in ways
        for way, written in zip(ways[name], answers[name], strict=True)
    ]
    return {"source": section["name"], "items": len(items), "batch_size": batch_size, "points": points}
