"""Sentences of the bundled corpus: statements, and questions with their replies, per kind of fact.

Fields in braces are filled from a fact's own; the first letter of an English sentence is made a capital afterwards.
phrases_en.py and phrases_zh.py hold them.
"""

from typing import NamedTuple


class Phrases(NamedTuple):
    statements: tuple[str, ...]
    exchanges: tuple[tuple[str, str], ...]  # (question, reply)


def asked(reply: str, *questions: str) -> tuple[tuple[str, str], ...]:
    """(question, reply) for several ways of asking for the same reply."""
    return tuple((question, reply) for question in questions)
