"""Canvases and settings of the decoders' tests."""

from types import SimpleNamespace

from model.decoding.canvas import Canvas
from model.decoding.decode import decode
from model.decoding.denoiser import DenoisingConfig

EOS, MASK, PAD = 2, 3, 0
GREEDY = DenoisingConfig(gen_temp=0.0, gen_repeat_penalty=0.0)
HOT = DenoisingConfig(gen_temp=1.0, gen_top_k=0, gen_repeat_penalty=0.5, gen_repeat_window=2)
PROMPTS = [[1, 7, 8], [1], [1, 9, 10, 11, 12, 13], [1, 5, 6, 2, 7], [1, 20, 21]]


def scripted_config(size=0):
    """The config of a stand-in for a network: full attention, or blocks of `size`."""
    return SimpleNamespace(
        attention="block" if size else "full",
        autoregressive=False,
        block_size=size,
        max_position_embeddings=64,
        inference_rope_scaling=False,
        eos_token_id=EOS,
        mask_token_id=MASK,
        pad_token_id=PAD,
        require_length=lambda *_: None,
    )


def continuing(model, prompts=PROMPTS, num_new=8):
    return Canvas.continuing(prompts, num_new, model.config)


def infilling(model):
    rows = [[1, None, None, 8, None, 2], [1, 5, None, 2], [1, None, None, 6, 7, None, None, None, 9, None, 2]]
    return Canvas.infilling(rows, model.config)


def spied(model, monkeypatch):
    """The inputs of every network call from now on."""
    calls, forward = [], model.forward

    def spy(ids, **arguments):
        calls.append(ids.clone())
        return forward(ids, **arguments)

    monkeypatch.setattr(model, "forward", spy)
    return calls


def steps_of(model, canvas, config):
    """The result and every step; row i has the seed i."""
    steps = []
    return decode(model, canvas, config, range(len(canvas.ids)), steps.append), steps
