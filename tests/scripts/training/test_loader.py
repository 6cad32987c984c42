"""What feeds the loop: batches made ahead by a thread, shared out among processes, of any width to a compiled layer."""

import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from model.transformer import Transformer
from scripts.engine.training.distributed import World
from scripts.engine.training.loader import Ahead, in_order
from scripts.train import diffusion


@pytest.fixture(autouse=True)
def _no_thread_is_left():
    yield
    assert "data" not in [thread.name for thread in threading.enumerate()]


def spoilt(items, error):
    yield from items
    raise error


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_items_come_in_order_and_an_exception_in_the_place_of_its_item(depth):
    with Ahead(range(20), depth) as items:
        assert list(items) == list(range(20)) and list(items) == []
    with Ahead(spoilt(range(3), OSError("row 4")), depth) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(OSError, match="row 4"):
                next(items)


def test_no_more_is_made_than_may_lie_ready():
    made = []
    with Ahead((made.append(number) for number in range(100)), depth=3) as items:
        for taken in (1, 2):
            next(items)
            deadline = time.monotonic() + 5
            while len(made) < taken + 3 and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.01)
            assert len(made) == taken + 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, SystemExit])
def test_the_thread_ends_however_the_loop_ends(error):
    with pytest.raises(error), Ahead(iter(int, 1)) as items:
        next(items)
        raise error


def dawdle():
    yield 1
    time.sleep(0.3)
    yield 2


def test_a_thread_that_is_long_in_coming_is_reported_with_the_place_where_it_is(capsys):
    with Ahead(dawdle(), patience=0.05) as items:
        assert list(items) == [1, 2]
    lines = capsys.readouterr().err.splitlines()
    assert 1 <= len(lines) <= 3  # after 0.05 s, after 0.1 s more, after 0.2 s more
    assert all("no batch for" in line and Path(__file__).name in line and "(dawdle)" in line for line in lines)


class Numbers:
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def batch(self, indices):
        return {"rows": torch.from_numpy(indices)}


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 40), st.integers(1, 4), st.integers(1, 4), st.integers(1, 60))
def test_processes_share_every_batch_without_gap_or_overlap(count, size, own, max_rows):
    """And all of them call the model equally often, as those must that hold a part of it each."""

    def parts(rank, size):
        return [(f, n, b["rows"].tolist()) for f, n, b in in_order(Numbers(count), own * size, max_rows, rank, size)]

    shares = [parts(rank, size) for rank in range(size)]
    chosen = np.linspace(0, count - 1, min(count, max_rows)).round().tolist() if count else []
    seen = {first + i: row for share in shares for first, n, rows in share for i, row in enumerate(rows[:n])}
    assert [seen[i] for i in sorted(seen)] == chosen
    assert sum(n for share in shares for _, n, _ in share) == len(chosen)
    assert {len(share) for share in shares} == {-(-len(chosen) // (own * size))}
    assert all(rows for share in shares for _, _, rows in share)
    whole = range(100, 100 + own * size)
    assert [i for rank in range(size) for i in whole[World(rank, size).share(0, own * size)]] == list(whole)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 50), st.integers(1, 9), st.none() | st.integers(1, 60))
def test_validation_rows_are_distinct_and_the_same_at_every_batch_size(count, size, max_rows):
    def rows(batch_size):
        batches = in_order(Numbers(count), batch_size, max_rows or count)
        return [row for _, own, b in batches for row in b["rows"].tolist() if own == len(b["rows"])]

    chosen = rows(size)
    assert len(set(chosen)) == len(chosen) == min(count, max_rows or count)
    assert chosen == rows(1) == sorted(chosen)


def test_rows_of_many_widths_cost_one_fixed_and_one_dynamic_graph(diffusion_argv, command, monkeypatch):
    """For each kind of call, with gradients or without, with a mask or without; and for the last layer, which goes on
    with the scored positions alone. A graph for every shape would take minutes each, and then give up."""
    torch._dynamo.reset()
    counter, shapes, kinds, forward = CompileCounter(), set(), set(), Transformer.forward

    def noted(self, input_ids, attn_mask=None, select=None, **more):
        if "forward" in vars(self.layers[0]):  # the closing sample is not compiled
            kind = torch.is_grad_enabled(), attn_mask is None
            kinds.add(kind)
            shapes.add((*kind, *input_ids.shape, len(select)))
        return forward(self, input_ids, attn_mask=attn_mask, select=select, **more)

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    monkeypatch.setattr(Transformer, "forward", noted)
    result = command(diffusion, [*diffusion_argv, "--compile", "--variable-length-prob", "0.7", "--max-iters", "20"])
    assert result.code == 0, result.err
    assert counter.frame_count <= 4 * len(kinds) < len(shapes), (counter.frame_count, kinds, shapes)
