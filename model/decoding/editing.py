"""Draft and edit: what is written may give way to what the model finds likelier once it sees more (LLaDA 2.1).

A step fills masked positions as its policy says, and by the same forward pass looks at the written ones of its block.
Where nothing is left to fill, the block gets steps that only edit, until one changes nothing.

Shapes: B rows, L positions, M written positions that a step looks at, V vocabulary.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
from torch import Tensor

from model.decoding.canvas import CanvasState
from model.decoding.denoiser_cache import Block
from model.decoding.remasking import DENOISING
from model.decoding.sampling import sample_tokens

MODES = {"quality": (0.7, 0.5), "speed": (0.5, 0.0)}  # thresholds of masks and of edits, of LLaDA 2.1-mini's card
MODELESS = "without --gen-mode"
EDITING = "with --gen-mode or --gen-edit-threshold at least 0", "without --gen-edit off"


@dataclass(frozen=True)
class EditingConfig:
    """Editing what diffusion has written."""

    gen_mode: Annotated[
        Literal[*MODES] | None,
        "draft and edit as LLaDA 2.1 does, --gen-remasking threshold with --gen-confidence-threshold and "
        "--gen-edit-threshold " + ", ".join(f"{mask} and {edit} ({name})" for name, (mask, edit) in MODES.items()),
        DENOISING,
    ] = None
    gen_edit_threshold: Annotated[
        float | None,
        "a written token gives way to the likeliest one if that is another and more probable than this; 0 = edit "
        "freely (none: no editing)",
        "in [0, 1]",
        MODELESS,
        "without --gen-edit off",
        DENOISING,
    ] = None
    gen_edit: Annotated[
        Literal["overwrite", "remask", "off"],
        "how it gives way: to the likeliest token, or to [MASK], once at most, to be written anew; off: a mode's "
        "threshold alone",
        ("--no-gen-edit", "off"),
        EDITING[0],
    ] = "overwrite"
    gen_post_edits: Annotated[
        int, "steps of a block that only edit, once all of it is written, at most", "at least 0", *EDITING
    ] = 16
    gen_edit_blocks: Annotated[
        int,
        "when a block is done, look once more at so many blocks before it, which then see it",
        "at least 0",
        *EDITING,
    ] = 0

    @property
    def edits(self) -> bool:
        return self.gen_edit != "off" and (self.gen_mode is not None or self.gen_edit_threshold is not None)

    def of_mode(self) -> dict[str, object]:
        """The settings that a mode stands for, by name; empty without one."""
        if self.gen_mode is None:
            return {}
        mask, edit = MODES[self.gen_mode]
        thresholds = {"gen_confidence_threshold": mask, "gen_edit_threshold": edit if self.gen_edit != "off" else None}
        return {"gen_mode": None, "gen_remasking": "threshold", **thresholds}


def gives_way(tokens: Tensor, likeliest: Tensor, probability: Tensor, editable: Tensor, threshold: float) -> Tensor:
    """LLaDA 2.1's rule for what is written, bool (M,): where it may be edited, another token is the likeliest, and its
    probability is above the threshold. All are (M,)."""
    return editable & (likeliest != tokens) & (probability > threshold)


@dataclass
class Progress:
    """How far a row's open block has come."""

    stop: int = 0  # tokens before this column may be edited
    reopened: bool = False  # it is of blocks that were done
    rounds: int = 0  # steps that began with nothing to fill
    seen: set[tuple[int, ...]] = field(default_factory=set)  # what stood in it when they began


class Editor:
    """The edits of a Denoiser: which tokens they change, and when a block is done.

    A block is done once all of it is written, up to the end of the text, and a step has changed nothing, or there were
    as many as may only edit, or what stands there has stood there before. So it takes no more steps than it has masks,
    and those that only edit; with `remask`, twice the masks, because no position goes back to [MASK] twice.
    """

    def __init__(self, state: CanvasState, config: EditingConfig, eos_last: bool):
        self.state, self.config, self.eos_last = state, config, eos_last
        state.edits, state.held = [0] * len(state.ids), set(state.active_rows)
        self.progress: dict[int, Progress] = {}  # of each row's open block
        self.remasked: list[set[int]] = [set() for _ in state.ids]  # columns of each row that went back to [MASK]

    def is_done(self, row: int) -> bool:
        """True if a row has no open block, and goes on to the next one."""
        return row not in self.progress

    def open(self, block: Block) -> None:
        """Begin a block."""
        self.progress[block.row] = Progress(stop=block.stop)

    def looks_back(self, block: Block, start: int) -> bool:
        """True if a block that is done sends the row back to its columns from `start` on: once, if any was open."""
        columns = self.state.open_columns[block.row]
        return not self.progress[block.row].reopened and bisect_left(columns, start) < bisect_left(columns, block.start)

    def reopen(self, window: Block, stop: int) -> None:
        """Look once more at the columns of a window of blocks that are before `stop`."""
        self.progress[window.row] = Progress(stop=stop, reopened=True)

    def plan(self, block: Block) -> None:
        """Set which columns of an open block the next step looks at. What is behind an end is no text: it is filled
        while something before it is, and not edited."""
        row, progress = block.row, self.progress[block.row]
        end, columns = self.state.end[row], self.state.open_columns[row]
        first = bisect_left(columns, block.start)
        last = min(bisect_left(columns, progress.stop), bisect_right(columns, end))
        masked = set(block.masked)
        block.visible = [column for column in columns[first:last] if column not in masked]
        if self._is_full(block):
            block.masked = ()
            progress.seen.add(self._content(block))

    def _is_full(self, block: Block) -> bool:
        """True if nothing before the end of the text is masked in a block."""
        masked = self.state.masked_columns[block.row]
        return not masked or masked[0] > min(self.state.end[block.row], block.stop - 1)

    def _content(self, block: Block) -> tuple[int, ...]:
        return tuple(self.state.ids[block.row, block.start : block.stop].tolist())

    def edits(self, logits: Tensor, blocks: list[Block]) -> tuple[Tensor, Tensor, Tensor]:
        """logits (M, V) at the visible columns of the blocks -> what each would give way to, with what probability, and
        whether it does, all (M,)."""
        state, remask = self.state, self.config.gen_edit == "remask"
        places = [(block.row, column) for block in blocks for column in block.visible]
        rows, columns = torch.tensor(places, dtype=torch.long).view(-1, 2).unbind(dim=1)
        likeliest, probability = (values.cpu() for values in sample_tokens(logits))
        # 1. Nothing goes back to [MASK] twice; an EOS that has to come last does not come by an edit before.
        fresh = [not remask or column not in self.remasked[row] for row, column in places]
        editable = torch.tensor(fresh, dtype=torch.bool)
        if self.eos_last:
            unfinished = [bool(block.masked) for block in blocks for _ in block.visible]
            editable &= (likeliest != state.eos_token_id) | ~torch.tensor(unfinished, dtype=torch.bool)
        # 2. The rule.
        changed = gives_way(state.ids[rows, columns], likeliest, probability, editable, self.config.gen_edit_threshold)
        if remask:
            likeliest, probability = torch.full_like(likeliest, state.mask_token_id), torch.zeros_like(probability)
        return likeliest, probability, changed

    def finishes(self, block: Block, changed: list[int]) -> bool:
        """Take note of a step that wrote these columns of a block; returns whether the block is done."""
        progress = self.progress[block.row]
        self.remasked[block.row] |= {column for column in changed if column in self.state.masked_columns[block.row]}
        progress.rounds += not block.masked
        stable = not block.masked and not changed
        last = progress.reopened or progress.rounds >= self.config.gen_post_edits
        return self._is_full(block) and (stable or last or self._content(block) in progress.seen)

    def close(self, block: Block) -> None:
        """Leave a block that is done; the row is finished if its text ends there."""
        del self.progress[block.row]
        self.state.release(block.row)
