"""What a text is by itself: its hash, by which validation is separated from training, and its language."""

import hashlib


def content_hash(content: str) -> int:
    """The first 64 bits (big-endian) of the SHA-256 of the UTF-8 content without surrounding whitespace."""
    return int.from_bytes(hashlib.sha256(content.strip().encode("utf-8")).digest()[:8], "big")


def is_validation(content: str, fraction: float) -> bool:
    """Return whether a row belongs to the validation part: content_hash(content) < fraction * 2**64.

    All stages share this rule. It depends on the content alone, so a text is on the same side in every file and order,
    and a larger fraction only adds to the validation part. Nothing is held out with 0, everything with 1.
    """
    return content_hash(content) < fraction * 2.0**64


def held_out_threshold(fraction: float, smallest: int, largest: int) -> float:
    """The hash below which rows are held out, where theirs go from `smallest` to `largest`.

    That of `is_validation`, unless it would hold out none of several contents: then just above the smallest hash.
    """
    threshold = fraction * 2.0**64
    return smallest + 1 if 0 < threshold <= smallest < largest else threshold


def language_of(text: str) -> str:
    """Return "zh" if at least a fifth of the letters are Chinese characters, else "other"."""
    letters = [c for c in text if c.isalpha()]
    return "zh" if letters and sum("\u4e00" <= c <= "\u9fff" for c in letters) >= 0.2 * len(letters) else "other"
