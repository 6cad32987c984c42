"""Models, files and folder of a report, and the facts on which its flags depend."""

import contextlib
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from model.decoding.autoregressive import SamplingConfig
from model.decoding.denoiser import DenoisingConfig
from scripts.engine.cli import TypedFlags
from scripts.engine.likelihood.windows import DIFFUSION
from scripts.engine.loaded import KINDS
from scripts.engine.report.frontier import FrontierConfig, samplers
from scripts.engine.report.measure import ANSWERED, IN_WORDS, LIKELIHOODS


@dataclass(frozen=True)
class Request:
    """Models, files and folder of a report."""

    minimind_checkpoint: Annotated[tuple[Path, ...] | None, "autoregressive models", "without --from"] = None
    diffusion_checkpoint: Annotated[tuple[Path, ...] | None, "diffusion models", "without --from"] = None
    tokenizer_dir: Annotated[Path, "directory with tokenizer.json and tokenizer_config.json", "without --from"] = Path(
        "."
    )
    eval_data: Annotated[
        tuple[Path, ...] | None,
        "files of rows or plain text, also bundled:task_questions (none: bundled questions)",
        "without --from",
    ] = None
    out: Annotated[Path | None, "folder of the report (none: weights/report; with --from, that of the file)"] = None
    redraw: Annotated[Path | None, "draw the report again from this report.json; no model is needed", "--from"] = None
    show: Annotated[
        int | None, "answers shown of each split and language (none: 3 of bundled questions)", "at least 0"
    ] = None

    def __post_init__(self):
        if self.redraw is None and not self.checkpoints:
            raise ValueError("give --minimind-checkpoint, --diffusion-checkpoint or both; or a report.json as --from")
        # Joint weights may be given as both kinds, each once.
        for paths in filter(None, (self.minimind_checkpoint, self.diffusion_checkpoint, self.eval_data)):
            for path in paths:
                if [other.resolve() for other in paths].count(path.resolve()) > 1:
                    raise ValueError(f"{path} is given twice; leave one out")

    @property
    def checkpoints(self) -> list[tuple[str, Path]]:
        """(kind, file) of every model, autoregressive ones first."""
        both = zip(KINDS, (self.minimind_checkpoint, self.diffusion_checkpoint), strict=True)
        return [(kind, path) for kind, paths in both for path in paths or ()]

    @property
    def folder(self) -> Path:
        return self.out or (self.redraw.parent if self.redraw else Path("weights/report"))


def require_folder(folder: Path) -> None:
    """Raise ValueError if the folder takes no file or cannot be made. That is tried; nothing is left behind."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        for path in reversed(missing):
            path.mkdir()
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"--out: {folder} cannot be written ({error.strerror}); choose another place") from None
    finally:
        for path in missing:
            with contextlib.suppress(OSError):  # it was not made, or another command has filled it
                path.rmdir()


def check_flags(
    given: TypedFlags,
    request: Request,
    sources: Collection[tuple[str, str]],
    frontier: FrontierConfig,
    max_new_tokens: int,
    configs: tuple[SamplingConfig, DenoisingConfig],
) -> None:
    """Raise ValueError for typed flags without effect. sources: (format, split)."""
    forms = {form for form, _ in sources}
    answered, diffusion = bool(forms & set(ANSWERED)), request.diffusion_checkpoint is not None
    drawn = answered and frontier.frontier_questions > 0
    given.refuse_without(
        {
            IN_WORDS: answered,
            LIKELIHOODS: forms != {"questions"},
            "questions": answered or "choices" in forms,
            DIFFUSION: diffusion,
            "conversations": "chat" in forms,
            "text or conversations": bool(forms & {"text", "chat"}),
            "rows that training held out": "validation" in {split for _, split in sources},
            "a frontier of a diffusion model": drawn and diffusion,
        }
    )
    ways = [sampler.config for config in configs if drawn for sampler in samplers(frontier, config, max_new_tokens)]
    given.refuse_idle(*configs, *ways)
