"""Preference tuning, of either kind of model: its frozen reference is read, checked, and known by its weights."""

import hashlib
import shlex
from dataclasses import replace

from dataset.preferences import PreferenceData, PreferenceDataset
from dataset.tokenizer import load_tokenizer
from model.import_weights import StartingWeights
from model.preference import Preference
from model.transformer import Transformer
from scripts.engine.training.config import StageConfigs
from scripts.engine.training.stage import Stage, read_start

AUTOREGRESSIVE = "autoregressive", "scripts.train.train_dpo_minimind"
DIFFUSION = "a diffusion model", "scripts.train.train_dpo_diffusion"
# Of both commands.
DEFAULTS = {
    "learning_rate": 2e-5,
    "lr_schedule": "cosine",
    "warmup_steps": 10,
    "batch_size": 64,
    "log_interval": 10,
    "eval_interval": 20,
}


def tune(name: str, configs: StageConfigs, objective: Preference, data: PreferenceData) -> None:
    """Run the stage called `name`. The reference is the model in --reference-from, or without that in --load-from."""
    tokenizer = load_tokenizer(data.tokenizer_dir)
    path = objective.reference_from or configs.run.load_from
    if configs.run.writes(path):
        raise ValueError(f"{path}, the reference, is a file that the run itself writes; choose another --run-name")
    start = read_start(path, configs, tokenizer)
    reference = reference_model(start, configs, objective.autoregressive, data.max_seq_len)
    objective = replace(objective, reference=reference, reference_from=path)
    start = start if path == configs.run.load_from else None  # a file is read once
    stage = Stage(name, configs, objective, data, tokenizer, chat=True, start=start)
    with stage.opened():
        config = stage.model.config
        dataset = stage.build(PreferenceDataset, attention=config.attention, block_size=config.block_size)
        dataset.meta["reference_sha256"] = weights_digest(reference)
        stage.train(dataset)


def reference_model(
    start: StartingWeights, configs: StageConfigs, autoregressive: bool, max_seq_len: int
) -> Transformer:
    """Return the frozen reference on the device of the run; raise ValueError if it is of the kind that the other
    command tunes."""
    way = "autoregressive" if autoregressive else "diffusion"
    if way not in start.config.kinds:
        kind, command = AUTOREGRESSIVE if start.config.autoregressive else DIFFUSION
        there = shlex.join(["uv", "run", "python", "-m", command, "--load-from", str(start.path)])
        raise ValueError(
            f"{start.path} is {kind}, which {command} tunes; give another checkpoint here, or it there: {there}"
        )
    model = start.model(start.config.as_kind(way))
    model.set_context(max_seq_len)
    return model.eval().to(configs.runtime.torch_device)


def weights_digest(model: Transformer) -> str:
    """Return 16 hex digits that differ with the weights of a model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().tobytes())
    return digest.hexdigest()[:16]
