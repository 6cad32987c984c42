"""Several ways of diffusion decoding, tried one after the other."""

import itertools
from dataclasses import dataclass, replace
from typing import Annotated

from model.decode import DenoisingConfig
from model.remasking import POLICIES
from scripts.engine import cli
from scripts.engine.decoding.generation import idle_sampling_flags

ADAPTIVE = ("threshold", "factor")  # take as many steps as they need
THRESHOLDED = ("threshold", "hybrid")


@dataclass(frozen=True)
class SamplerGrid:
    """Samplers to compare."""

    policies: Annotated[str | None, "comma-separated: try these policies instead of --gen-remasking"] = None
    steps: Annotated[str | None, "comma-separated: try these step counts instead of --gen-steps"] = None
    thresholds: Annotated[
        tuple[float, ...] | None, "threshold, hybrid: try these instead of --gen-confidence-threshold"
    ] = None

    def __post_init__(self):
        unknown = [name for name in _parts(self.policies) if name not in POLICIES]
        if unknown:
            raise ValueError(f"--policies: {unknown[0]!r} is not one of {', '.join(POLICIES)}")
        if not all(part.isdecimal() and int(part) for part in _parts(self.steps)):
            raise ValueError(f"--steps {self.steps}: expected positive numbers, separated by commas")
        if not all(0 < value <= 1 for value in self.thresholds or ()):
            raise ValueError(f"--thresholds {self.thresholds}: expected probabilities above 0")

    def samplers(self, denoising: DenoisingConfig) -> dict[str, DenoisingConfig]:
        """name -> settings, for every policy with every step count and threshold asked for that it heeds."""
        found = {}
        for policy in _parts(self.policies) or [denoising.gen_remasking]:
            counts = [int(part) for part in _parts(self.steps)] if policy not in ADAPTIVE else []
            asked = self.thresholds if policy in THRESHOLDED else None
            pairs = itertools.product(counts or [denoising.gen_steps], asked or [denoising.gen_confidence_threshold])
            for count, threshold in pairs:
                name = policy + (f" {threshold:g}" if asked else "")
                name += "" if policy in ADAPTIVE else f", {count} steps"
                found[name] = replace(
                    denoising, gen_remasking=policy, gen_steps=count, gen_confidence_threshold=threshold
                )
        return found

    def refuse_idle(self, denoising: DenoisingConfig, given: frozenset[str]) -> None:
        """ValueError for typed flags that none of the samplers heeds."""
        configs = list(self.samplers(denoising).values())
        adaptive = [config.gen_remasking in ADAPTIVE for config in configs]
        thresholded = any(config.gen_remasking in THRESHOLDED for config in configs)
        cli.refuse_idle(
            given,
            gen_remasking=(self.policies is None, "one policy: --policies names several"),
            gen_steps=(self.steps is None or any(adaptive), "one step count: --steps names several"),
            thresholds=(thresholded, "the policy threshold or hybrid"),
            gen_confidence_threshold=(self.thresholds is None, "one threshold: --thresholds names several"),
            steps=(not all(adaptive), "a policy other than threshold and factor, which take as many as they need"),
        )
        needs = [idle_sampling_flags(config) for config in configs]
        used = {name: (any(need[name][0] for need in needs), condition) for name, (_, condition) in needs[0].items()}
        cli.refuse_idle(given, **used)


def _parts(names: str | None) -> list[str]:
    """What stands between the commas."""
    return [] if names is None else [name.strip() for name in names.split(",")]
