"""What tests of several decoders share."""

import pytest
import torch

from tests.model.decoding.canvases import EOS


@pytest.fixture
def ending_model(tiny_model):
    """ending_model(bias, **changes): a tiny model whose EOS logit is raised by `bias`."""

    def build(bias, **changes):
        model = tiny_model(**changes)
        raised = torch.zeros(24)
        raised[EOS] = bias
        model.lm_head.register_forward_hook(lambda module, args, logits: logits + raised)
        return model

    return build
