"""Several ways of diffusion decoding, tried one after the other."""

import itertools
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from model.decoding.denoiser import DenoisingConfig
from model.decoding.editing import MODELESS
from model.decoding.remasking import REMASKING, SELF_SPECULATIVE

ADAPTIVE = ("threshold", "factor", "entropy_bound", SELF_SPECULATIVE)  # take as many steps as they need
THRESHOLDED = ("threshold", "hybrid")


@dataclass(frozen=True)
class SamplerGrid:
    """Samplers to compare."""

    policies: Annotated[
        tuple[Literal[*REMASKING], ...] | None, "policies to try instead of --gen-remasking", MODELESS
    ] = None
    steps: Annotated[
        tuple[int, ...] | None,
        "step counts to try instead of --gen-steps",
        "at least 1",
        f"without --gen-remasking {', '.join(ADAPTIVE[:-1])} or {ADAPTIVE[-1]}",
        MODELESS,
    ] = None
    thresholds: Annotated[
        tuple[float, ...] | None,
        "thresholds to try instead of --gen-confidence-threshold",
        "in (0, 1]",
        "with --gen-remasking threshold or hybrid",
        MODELESS,
    ] = None

    def samplers(self, denoising: DenoisingConfig) -> dict[str, DenoisingConfig]:
        """name -> settings, for every policy with every step count and threshold asked for that it heeds."""
        found = {}
        for policy in self.policies or [denoising.gen_remasking]:
            counts = self.steps if policy not in ADAPTIVE else None
            asked = self.thresholds if policy in THRESHOLDED else None
            pairs = itertools.product(counts or [denoising.gen_steps], asked or [denoising.gen_confidence_threshold])
            for count, threshold in pairs:
                name = policy + (f" {threshold:g}" if asked else "")
                name += "" if policy in ADAPTIVE else f", {count} steps"
                found[name] = replace(
                    denoising, gen_remasking=policy, gen_steps=count, gen_confidence_threshold=threshold
                )
        return found
