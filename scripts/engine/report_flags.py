"""Which flags of the report have an effect, given its models and files."""

from collections.abc import Collection
from dataclasses import fields

from model.decode import ContinuationConfig, DenoisingConfig, SamplingConfig
from scripts.engine.cli import refuse_idle
from scripts.engine.evaluation import KINDS
from scripts.engine.generation import idle_sampling_flags
from scripts.engine.report_frontier import FrontierConfig, samplers
from scripts.engine.report_items import ANSWERED


def check_flags(
    kinds: Collection[str],
    sources: Collection[tuple[str, str]],
    bundled: bool,
    frontier: FrontierConfig,
    continuation: ContinuationConfig,
    sampling: SamplingConfig,
    denoising: DenoisingConfig,
    given: frozenset[str],
) -> None:
    """ValueError for typed flags that would be ignored. kinds: attentions of the models; sources: (format, split)."""
    forms = {form for form, _ in sources}
    asked, diffusion = bool(forms & set(ANSWERED)), "full" in kinds
    drawn = asked and frontier.frontier_questions > 0
    words = "questions that are answered in words"
    scored = "text, conversations, multiple choice, poems or open questions", forms != {"questions"}
    refuse_idle(
        given,
        questions=(asked, words),
        batch_size=(asked, words),
        frontier_questions=(asked, words),
        **dict.fromkeys((f.name for f in fields(ContinuationConfig)), (asked, words)),
        chat_wrap=(asked or "choices" in forms, "questions"),
        eval_batch_size=scored[::-1],
        num_samples=(scored[1] and diffusion, f"a diffusion model and {scored[0]}"),
        canvas=("chat" in forms and diffusion, "a diffusion model and conversations"),
        eval_split=(not bundled and bool(forms & {"text", "chat"}), "--eval-data with text or conversations"),
        val_fraction=("validation" in {split for _, split in sources}, "rows that training held out"),
        **dict.fromkeys(
            (f.name for f in fields(FrontierConfig) if f.name != "frontier_questions"),
            (drawn and diffusion, "a frontier of a diffusion model"),
        ),
    )
    for attention, config in (("causal", sampling), ("full", denoising)):
        flag = KINDS[attention][1]
        refuse_idle(given, **dict.fromkeys((f.name for f in fields(config)), (attention in kinds, flag)))
        refuse_idle(given, **dict.fromkeys((f.name for f in fields(config)), (asked, words)))
        used = [config]
        if drawn:
            used += [sampler.config for sampler in samplers(frontier, config, continuation.max_new_tokens)]
        needs = [idle_sampling_flags(one) for one in used]
        refuse_idle(given, **{name: (any(n[name][0] for n in needs), needs[0][name][1]) for name in needs[0]})
