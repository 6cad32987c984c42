"""Whether two tokenizers give their ids to the same entries."""

from pathlib import Path

from tokenizers import Tokenizer

from dataset.tokenizer import PreTrainedTokenizerFast


def require_same_entries(tokenizer: PreTrainedTokenizerFast, file: Path) -> None:
    """Raise ValueError if `tokenizer` has other entries than the tokenizer.json in `file`.

    The mask token may have been added to it.
    """
    try:
        theirs = Tokenizer.from_file(str(file)).get_vocab()
    except Exception as error:  # the Rust library raises nothing more specific
        raise ValueError(f"{file} is not a tokenizer ({error}); copy it again") from None
    ours = tokenizer.get_vocab()
    if tokenizer.mask_token not in theirs:
        ours.pop(tokenizer.mask_token, None)
    different = {(number, entry) for entry, number in ours.items() ^ theirs.items()}
    if different:
        number = min(different)[0]
        there, here = (next((e for e, n in entries.items() if n == number), None) for entries in (theirs, ours))
        count = len({number for number, _ in different})
        raise ValueError(
            f"{file}, beside the weights, has {count} other entries than the tokenizer in use: id {number} is "
            f"{there!r} there and {here!r} here; give --tokenizer-dir {file.parent}"
        )
