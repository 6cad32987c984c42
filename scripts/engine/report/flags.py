"""What the report is asked for, and which of its flags have an effect, given its models and files."""

import contextlib
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from model.decode import ContinuationConfig, DenoisingConfig, SamplingConfig
from scripts.engine.cli import refuse_idle
from scripts.engine.decoding.generation import idle_sampling_flags
from scripts.engine.loaded import KINDS
from scripts.engine.report.frontier import FrontierConfig, samplers
from scripts.engine.report.measure import ANSWERED, paths_in


@dataclass(frozen=True)
class Request:
    """What to do."""

    minimind_checkpoint: Annotated[str | None, "autoregressive model, or several separated by commas"] = None
    diffusion_checkpoint: Annotated[str | None, "diffusion model, or several"] = None
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json"] = Path(".")
    eval_data: Annotated[str | None, "files separated by commas: .jsonl or .txt, either may be .gz (none: bundled)"] = (
        None
    )
    out: Annotated[Path | None, "folder of the report (none: weights/report; with --from, that of the file)"] = None
    redraw: Annotated[Path | None, "draw the report again from this report.json; no model is needed", "--from"] = None
    show: Annotated[int | None, "answers shown of each split and language (none: 3 of bundled questions)"] = None

    def __post_init__(self):
        if self.redraw is None and not self.checkpoints:
            raise ValueError("give --minimind-checkpoint, --diffusion-checkpoint or both; or a report.json as --from")
        if self.show is not None and self.show < 0:
            raise ValueError(f"--show must not be negative, not {self.show}")
        paths = [path for _, path in self.checkpoints]
        for path in paths:
            if [other.resolve() for other in paths].count(path.resolve()) > 1:
                raise ValueError(f"{path} is given twice; leave one out")
        if self.eval_data is not None:
            paths_in(self.eval_data, "--eval-data")

    @property
    def files(self) -> list[Path]:
        """Those of --eval-data."""
        return [] if self.eval_data is None else paths_in(self.eval_data, "--eval-data")

    @property
    def checkpoints(self) -> list[tuple[str, Path]]:
        """(kind, file) of every model, autoregressive ones first."""
        both = zip(KINDS, (self.minimind_checkpoint, self.diffusion_checkpoint), strict=True)
        given = [(kind, names) for kind, names in both if names is not None]
        return [(kind, path) for kind, names in given for path in paths_in(names, KINDS[kind])]

    @property
    def folder(self) -> Path:
        return self.out or (self.redraw.parent if self.redraw else Path("weights/report"))


def require_folder(folder: Path) -> None:
    """ValueError if the report's folder takes no file, or cannot be made; found out by trying. Leaves nothing."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        for path in reversed(missing):
            path.mkdir()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--out: {folder} cannot be written ({error.strerror}); choose another place") from None
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # not made, or filled by another command
                path.rmdir()


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
    """ValueError for typed flags that would be ignored. kinds: those of the models; sources: (format, split)."""
    forms = {form for form, _ in sources}
    asked, diffusion = bool(forms & set(ANSWERED)), "diffusion" in kinds
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
        on_bad_row=(not bundled, "--eval-data"),
        eval_split=(not bundled and bool(forms & {"text", "chat"}), "--eval-data with text or conversations"),
        val_fraction=("validation" in {split for _, split in sources}, "rows that training held out"),
        **dict.fromkeys(
            (f.name for f in fields(FrontierConfig) if f.name != "frontier_questions"),
            (drawn and diffusion, "a frontier of a diffusion model"),
        ),
    )
    for (kind, flag), config in zip(KINDS.items(), (sampling, denoising), strict=True):
        refuse_idle(given, **dict.fromkeys((f.name for f in fields(config)), (kind in kinds, flag)))
        refuse_idle(given, **dict.fromkeys((f.name for f in fields(config)), (asked, words)))
        used = [config]
        if drawn:
            used += [sampler.config for sampler in samplers(frontier, config, continuation.max_new_tokens)]
        needs = [idle_sampling_flags(one) for one in used]
        refuse_idle(given, **{name: (any(n[name][0] for n in needs), needs[0][name][1]) for name in needs[0]})
