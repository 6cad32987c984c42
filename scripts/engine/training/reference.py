"""The frozen reference of preference tuning: read, checked, and told apart from others."""

import hashlib
import shlex
from dataclasses import replace

from dataset.tokenizer import PreTrainedTokenizerFast, fingerprint, token_ids
from model.checkpoint import build_model
from model.import_weights import starting_weights
from model.preference import Preference
from model.transformer import Transformer
from scripts.engine.training.stage import StageConfigs

AUTOREGRESSIVE = "autoregressive", "scripts.train.train_dpo_minimind"
DIFFUSION = "a diffusion model", "scripts.train.train_dpo_diffusion"


def with_reference(
    objective: Preference, configs: StageConfigs, tokenizer: PreTrainedTokenizerFast, max_seq_len: int
) -> Preference:
    """`objective` with the model in --reference-from, or without that in --load-from, on the device of the run.

    Resuming reads it again. ValueError: it is of the kind that the other command tunes, or the run would overwrite it.
    """
    run, path = configs.run, objective.reference_from or configs.run.load_from
    if run.writes(path):
        raise ValueError(f"{path}, the reference, is a file that the run itself writes; choose another --run-name")
    shape = replace(configs.shape, **token_ids(tokenizer))
    config, weights = starting_weights(path, shape, configs.given, fingerprint(tokenizer))
    model = build_model(config, weights, str(path))
    if config.autoregressive != objective.autoregressive:
        kind, command = AUTOREGRESSIVE if config.autoregressive else DIFFUSION
        there = shlex.join(["uv", "run", "python", "-m", command, "--load-from", str(path)])
        raise ValueError(f"{path} is {kind}, which {command} tunes; give another checkpoint here, or it there: {there}")
    model.set_context(max_seq_len)
    model.eval().to(configs.runtime.torch_device)
    return replace(objective, reference=model, reference_from=path)


def weights_digest(model: Transformer) -> str:
    """16 hex digits that tell the weights of a model from others."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()[:16]
