"""The seconds of a training step, as the quickstart measures them."""

import torch

from scripts.engine.bench import pace
from scripts.engine.runtime import RuntimeConfig


def test_a_measurement_leaves_no_trace_in_the_random_numbers_and_is_that_of_whole_steps(monkeypatch):
    monkeypatch.setattr(pace, "ROWS", (2, 8))
    now = iter(range(0, 1000, 3))
    monkeypatch.setattr(pace.time, "perf_counter", lambda: next(now))  # a step takes 3 seconds
    before = torch.get_rng_state()
    assert pace.seconds_of_a_step(RuntimeConfig(device="cpu", dtype="float32")) == 3
    assert torch.equal(before, torch.get_rng_state())
    assert next(now) == 4 * 3, "of slow steps no more than one is measured after the first"
