"""Checks of rows: texts that a tokenizer cannot spell, and texts that spell control tokens."""

import re

from tokenizers import models

from dataset.reading.rows import Check
from dataset.tokenizer import PreTrainedTokenizerFast, encode

MAX_BLANKS = 5_000_000  # in a row; the regular expression that cuts text gives up, by a panic, at ten million


def spelling_check(tokenizer: PreTrainedTokenizerFast, control: bool = False) -> Check:
    """Return check(text), which raises ValueError for a text that `encode(tokenizer, text, control)` refuses.

    With `control` also for one that spells the mask or the padding token, which cannot be learnt. Rows are checked one
    by one because they are encoded many at a time, when the one at fault is no longer known.
    """
    backend = tokenizer.backend_tokenizer
    barred = (tokenizer.mask_token, tokenizer.pad_token) if control else ()
    by_characters = isinstance(backend.model, models.WordLevel)
    known = {entry for entry in backend.get_vocab() if len(entry) == 1} if by_characters else set()

    def check(text: str) -> None:
        check_blanks(text)
        for name in barred:
            if name in text:
                raise ValueError(
                    f"the text spells {name}, which as a control token cannot be learnt; correct or delete that row, "
                    "or leave out --control-tokens"
                )
        if by_characters and not known.issuperset(text):
            encode(tokenizer, text, control)

    return check


def check_blanks(text: str) -> None:
    """Raise ValueError for a text with a run of blank characters that is too long to be cut."""
    if len(text) > MAX_BLANKS and any(len(run) > MAX_BLANKS for run in re.findall(r"\s+", text)):
        raise ValueError(f"the text has more than {MAX_BLANKS:,} blank characters in a row; correct or delete that row")


def control_names(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Matches the name of every control token."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder().values()
    return re.compile("|".join(re.escape(token.content) for token in added if token.special))
