"""Averaging checkpoints."""

import pytest
import torch

from model.checkpoint import average_weights


def test_the_average_of_equal_weights_is_themselves_bit_for_bit(tiny_model):
    weights = tiny_model().state_dict()
    for number in (1, 3, 5):
        merged = average_weights([weights] * number)
        assert merged.keys() == weights.keys()
        assert all(torch.equal(merged[name], weights[name]) for name in weights)


def test_a_linear_layer_of_averaged_weights_gives_the_averaged_outputs():
    layers, x = [torch.nn.Linear(5, 3) for _ in range(4)], torch.randn(7, 5)
    merged = torch.nn.Linear(5, 3)
    merged.load_state_dict(average_weights([layer.state_dict() for layer in layers]))
    torch.testing.assert_close(merged(x), sum(layer(x) for layer in layers) / 4)


def test_weights_of_different_shapes_are_not_averaged():
    with pytest.raises(ValueError, match="different models"):
        average_weights([{"a": torch.zeros(2)}, {"a": torch.zeros(3)}])
    with pytest.raises(ValueError, match="different models"):
        average_weights([{"a": torch.zeros(2)}, {"b": torch.zeros(2)}])
