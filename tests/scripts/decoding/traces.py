"""Traces of decodings that never were."""

import torch

from dataset.tokenizer import encode
from model.decoding.canvas import DecodingStep
from scripts.engine.decoding.trace import Trace, Vocabulary

MASK, EOS = 3, 2


def recorded(tokenizer, prompt, new, writes, info=None):
    """The trace of `writes` [[(offset into `new`, id, confidence), ...] per step], and the canvases it went through."""
    canvas = torch.tensor([[*prompt, *[MASK] * len(new)]])
    trace, seen = Trace(Vocabulary(tokenizer), canvas[0], canvas[0] == MASK, info), [canvas[0].tolist()]
    for number, step in enumerate(writes, start=1):
        canvas, written = canvas.clone(), torch.zeros_like(canvas, dtype=torch.bool)
        confidence = torch.zeros(canvas.shape)
        for offset, token, probability in step:
            place = 0, len(prompt) + offset
            canvas[place], written[place], confidence[place] = token, True, probability
        trace.add(DecodingStep(canvas, written, confidence, 2 * number))
        seen.append(canvas[0].tolist())
    return trace, seen


def one_by_one(tokenizer, prompt, new, info=None, backwards=False):
    order = list(enumerate(new))[:: -1 if backwards else 1]
    return recorded(tokenizer, prompt, new, [[(i, token, 0.5)] for i, token in order], info)[0]


def written_as(tokenizer, prompt, text, **more):
    return one_by_one(tokenizer, [1, *encode(tokenizer, prompt)], encode(tokenizer, text), **more)
