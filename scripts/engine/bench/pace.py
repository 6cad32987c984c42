"""How fast a machine trains: the seconds of an optimizer step, from a second or two of work."""

import time

import numpy as np
import torch

from model.config import ModelConfig
from model.objective import NextToken
from model.transformer import Transformer
from scripts.engine.bench.timing import synchronise
from scripts.engine.runtime import RuntimeConfig, keep_freed_memory, to_device
from scripts.engine.training.optim import OptimConfig, make_optimizers, scale_and_clip

SHAPE = ModelConfig(
    hidden_size=192,
    num_hidden_layers=4,
    num_attention_heads=6,
    tie_embeddings=True,
    vocab_size=4096,
    attention="causal",
)
ROWS = (64, 64)  # of a step: their number and length
STEPS, ENOUGH = 3, 2.0  # measured are so many, or as many as take so many seconds


def seconds_of_a_step(runtime: RuntimeConfig) -> float:
    """The median of a few autoregressive steps after a first one, of a network of SHAPE on random tokens, as training
    takes them here. No random number of the process is used up."""
    device = runtime.torch_device
    keep_freed_memory()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        network = Transformer(SHAPE).to(device).train()
        ids = torch.randint(4, SHAPE.vocab_size, ROWS)
    objective, parameters = NextToken(), list(network.parameters())
    optimizers = make_optimizers(network, OptimConfig(optimizer="muon"))
    batch = {"input_ids": ids, "loss_mask": torch.ones_like(ids, dtype=torch.bool)}

    def step() -> None:
        prepared = to_device(objective.prepare(batch, SHAPE), device)
        with runtime.autocast():
            nats = objective.loss(network, prepared).nats.sum()
        (nats / ids.numel()).backward()
        scale_and_clip(parameters, torch.ones((), device=device), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    seconds = []
    while len(seconds) <= STEPS and sum(seconds) < ENOUGH or len(seconds) < 2:
        synchronise(device)
        began = time.perf_counter()
        step()
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return float(np.median(seconds[1:]))
