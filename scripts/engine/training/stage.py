"""What all training stages share: refuse or open the run, find the starting weights, say what will happen, train."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from dataset.tokenizer import PreTrainedTokenizerFast, fingerprint, token_ids
from model.checkpoint import build_model, load_checkpoint, read_archive
from model.config import ModelConfig
from model.forward_process import rate_range
from model.import_weights import starting_weights
from model.objective import Objective
from model.transformer import Transformer
from scripts.engine.cli import refuse_idle
from scripts.engine.files import locked, require_output, require_writable
from scripts.engine.flags import defaults_of, settings_of
from scripts.engine.runtime import RuntimeConfig, command_line, keep_freed_memory, provenance
from scripts.engine.training.distributed import World, whole
from scripts.engine.training.optim import OptimConfig
from scripts.engine.training.preview import dry_run, show_batch
from scripts.engine.training.run import RunConfig, compare_settings, continues
from scripts.engine.training.trainer import Trainer
from scripts.engine.training.trainer_config import TrainerConfig

# For weights that an autoregressive stage cannot start from: what trains them on.
BY_DIFFUSION = {
    "scripts.train.train_pretrain": "scripts.train.diffusion --train",
    "scripts.train.train_sft_minimind": "scripts.train.train_sft_diffusion",
    "scripts.train.train_dpo_minimind": "scripts.train.train_dpo_diffusion",
}


@dataclass(frozen=True)
class StageConfigs:
    """The groups of flags that every training stage has."""

    shape: ModelConfig
    optim: OptimConfig
    trainer: TrainerConfig
    run: RunConfig
    runtime: RuntimeConfig
    given: frozenset[str]  # fields typed on the command line
    argv: list[str] | None  # what was typed, as `main` was given it


def train_stage(
    stage: str,
    configs: StageConfigs,
    objective: Objective,
    data: Any,
    tokenizer: PreTrainedTokenizerFast,
    build: Callable[[ModelConfig], Any],
    before_training: Callable[[], None] = lambda: None,
) -> Transformer | None:
    """Run the stage called `stage`; returns the trained model, or None after --dry-run or --show-batch, and in all
    processes but the first.

    data: the data group of flags, with `data` and `max_seq_len`. build(config of the model) -> the dataset: `train` and
    `validation` rows, `meta`, `describe()`; it is called only once nothing else is wrong, since reading a corpus takes
    time.
    before_training() is called when nothing can be refused any more; what else a stage writes, it writes there.
    """
    run = configs.run
    with World.opened(configs.runtime.torch_device) as world, _alone_at(run, data, world):
        state = load_checkpoint(run.state_path) if not run.previewing and continues(run) else None
        groups = configs.shape, configs.optim, configs.trainer, run, configs.runtime, objective, data
        settings = settings_of(*groups)
        _refuse_idle(configs, objective, data)
        if state:  # flags that came after it was saved had their defaults
            state["settings"] = {k: v for k, v in defaults_of(*groups).items() if k in settings} | state["settings"]
        notes = _check_continuation(state, stage, settings, tokenizer, run) if state else []
        objective, model = _starting_model(stage, configs, objective, tokenizer, state)
        moments = _starting_moments(configs) if run.resume_optimizer_state and not state else None
        model.set_context(data.max_seq_len)
        dataset = world.main_first(lambda: build(model.config))  # caches are made once
        _require_dataset(dataset, configs, state, data, objective)
        if world.is_main:
            print(_header(stage, model, dataset, configs, state), flush=True)
            for note in notes:
                print(f"resuming with another setting: {note}")
        if run.previewing:
            if world.is_main:
                _preview(model, objective, dataset, configs, tokenizer)
            return None
        identity = {
            "tokenizer": fingerprint(tokenizer),
            "stage": stage,
            "settings": settings,
            "data": dataset.meta,
            "command": command_line(stage, configs.argv),
            "provenance": provenance(configs.runtime),
        }
        if world.is_main:
            before_training()
        return _fit(world, model, objective, dataset, configs, identity, state, moments)


@contextmanager
def _alone_at(run: RunConfig, data: Any, world: World) -> Iterator[None]:
    """Within it no other command writes the run. ValueError if one does, or if its files cannot be written."""
    require_writable(run.state_path, "--save-dir")
    require_output(run.exported_path, "--weights-path", data.data, data.tokenizer_dir, run.load_from)
    with locked(run.lock_path) if world.is_main and not run.previewing else nullcontext():
        world.most(0)  # only now may the others look at what is there
        yield


def _require_dataset(
    dataset: Any, configs: StageConfigs, state: dict[str, Any] | None, data: Any, objective: Any
) -> None:
    """ValueError if it has no rows that an early stop needs, or is not what the saved run was trained on."""
    run = configs.run
    if configs.trainer.early_stop_patience and not len(dataset.validation):
        raise ValueError("--early-stop-patience needs validation rows, and there are none; raise --val-fraction")
    if state and state["data"]["data_sha256"] != dataset.meta["data_sha256"]:
        raise ValueError(
            f"{run.state_path} was trained on other contents of {data.source}; "
            "give the same file, or choose another --run-name"
        )
    if state and state["data"].get("reference_sha256") != dataset.meta.get("reference_sha256"):
        raise ValueError(
            f"{run.state_path} was tuned against another reference than {objective.reference_from}; "
            "give the same weights with --reference-from, or choose another --run-name"
        )


def require_start(configs: StageConfigs, example: str) -> None:
    """ValueError without --load-from: fine-tuning random weights is nearly always a forgotten flag."""
    if configs.run.load_from is None:
        raise ValueError(f"--load-from is missing: give the pretrained weights to start from, such as {example}")


def _preview(model: Transformer, objective: Any, dataset: Any, configs: StageConfigs, tokenizer: Any) -> None:
    keep_freed_memory()
    rows, size, seed = dataset.train, configs.trainer.rows_per_step, configs.runtime.seed
    if configs.run.show_batch:
        total = configs.trainer.total_steps(len(rows))
        show_batch(tokenizer, objective, rows, size, model.config, seed, configs.run.show_step, total)
    if configs.run.dry_run:
        dry_run(model, objective, rows, configs.trainer, configs.runtime, configs.trainer.total_steps(len(rows)))


def _fit(
    world: World,
    model: Transformer,
    objective: Any,
    dataset: Any,
    configs: StageConfigs,
    identity: dict,
    state: dict | None,
    moments: list[dict] | None,
) -> Transformer | None:
    keep_freed_memory()
    trainer = Trainer(
        model,
        objective,
        dataset.train,
        dataset.validation,
        optim=configs.optim,
        trainer=configs.trainer,
        run=configs.run,
        runtime=configs.runtime,
        identity=identity,
        state=state,
        moments=moments,
        world=world,
    )
    if world.is_main:
        trainer.log.write(
            "resume" if state else "start",
            step=trainer.step,
            total_steps=trainer.total_steps,
            parameters=model.num_parameters(),
            config=asdict(trainer.model.config),
            **identity,
        )
    trainer.fit()
    weights = whole(model.state_dict(), keep=world.is_main)
    if configs.trainer.fsdp and world.is_main:  # what comes next has one process to itself
        context, model = model.context_length, Transformer(model.config)
        model.load_state_dict(weights)
        model.to(configs.runtime.torch_device).context_length = context
    return model if world.is_main else None


def _refuse_idle(configs: StageConfigs, objective: Any, data: Any) -> None:
    """ValueError for typed flags that the others switch off."""
    penalty = getattr(objective, "repeat_penalty_weight", 0) > 0, "a positive --repeat-penalty-weight"
    wsd = configs.optim.lr_schedule == "wsd", "--lr-schedule wsd"
    if {"lr_stable_ratio", "final_decay_ratio"} <= configs.given:
        raise ValueError("--lr-stable-ratio and --final-decay-ratio say the same; give one of them")
    refuse_idle(
        configs.given,
        lr_stable_ratio=wsd,
        final_decay_ratio=wsd,
        cache_dir=(not getattr(data, "streaming", False), "a cache: --streaming keeps none"),
        early_stop_min_delta=(configs.trainer.early_stop_patience > 0, "--early-stop-patience"),
        **_idle_noise_flags(objective),
        repeat_penalty_min_run=penalty,
        repeat_penalty_delay_steps=penalty,
        repeat_penalty_warmup_steps=penalty,
    )
    if configs.trainer.fsdp and configs.runtime.torch_dtype == torch.float16:
        raise ValueError("--fsdp trains in bfloat16 or float32; choose one of them with --dtype, or leave out --fsdp")
    if getattr(objective, "block_size", None) == 1:
        told = False, "blocks of more than one token, which are masked at any rate but 1"
        refuse_idle(
            configs.given, **dict.fromkeys(("mask_rate_min", "mask_rate_max", "noise_schedule", "iid_mask_eps"), told)
        )
    if "iid_mask_eps" in configs.given and objective.mask_schedule == "iid_t":
        eps, used = objective.iid_mask_eps, rate_range(objective)
        reached = used[0] == eps or used[1] == 1 - eps
        refuse_idle(configs.given, iid_mask_eps=(reached, "a band of mask rates that reaches to within eps of 0 or 1"))


def _idle_noise_flags(objective: Any) -> dict[str, tuple[bool, str]]:
    """For `refuse_idle`: the flags of the forward process that have an effect only with another one's value."""
    schedule = getattr(objective, "mask_schedule", "")
    wsd, timed = (schedule == "wsd", "--mask-schedule wsd"), schedule in ("iid_t", "wsd")
    curriculum = getattr(objective, "use_block_curriculum", False), "--use-block-curriculum"
    weighted = schedule == "iid_t" or (schedule == "wsd" and objective.time_weighted_loss)
    return {
        "iid_mask_eps": (timed, "--mask-schedule iid_t or wsd"),
        "noise_schedule": (timed, "--mask-schedule iid_t or wsd"),
        **dict.fromkeys(("wsd_min_mask_ratio", "wsd_max_mask_ratio", "wsd_warmup_ratio", "wsd_stable_ratio"), wsd),
        **dict.fromkeys(("wsd_phase_ratios", "wsd_block_sizes_up", "wsd_block_sizes_down"), curriculum),
        "mask_rate_min": (not wsd[0], "another --mask-schedule: wsd has --wsd-min-mask-ratio"),
        "mask_rate_max": (not wsd[0], "another --mask-schedule: wsd has --wsd-max-mask-ratio"),
        "time_weighted_loss": wsd,
        "time_weight_eps": (weighted, "--mask-schedule iid_t, or wsd and --time-weighted-loss"),
        "mask_embedding_noise_steps": (
            getattr(objective, "mask_embedding_noise", 0) > 0,
            "a positive --mask-embedding-noise",
        ),
    }


def _check_continuation(
    state: dict[str, Any], stage: str, settings: dict, tokenizer: PreTrainedTokenizerFast, run: RunConfig
) -> list[str]:
    """Lines on what differs harmlessly; ValueError if the saved run is another stage's or had other settings."""
    if state["stage"] != stage:
        raise ValueError(
            f"{run.state_path} is a run of {state['stage']}, not of {stage}: go on with it by "
            f"uv run python -m {state['stage']} --run-name {run.run_name} --resume must, "
            "or choose another --run-name, and --load-from for its weights"
        )
    if "step" not in state or "optimizers" not in state:
        raise ValueError(f"{run.state_path} holds weights only; resume from the run's own <run-name>.pt")
    if state["tokenizer"] != fingerprint(tokenizer):
        raise ValueError(
            f"{run.state_path} was trained with another tokenizer; give its directory with --tokenizer-dir"
        )
    return compare_settings(state["settings"], settings, run.state_path)


def _starting_model(
    stage: str,
    configs: StageConfigs,
    objective: Objective,
    tokenizer: PreTrainedTokenizerFast,
    state: dict[str, Any] | None,
) -> tuple[Objective, Transformer]:
    """Return the settled objective, and the saved run's model, that of --load-from, or a new one seeded by --seed.

    Raises ValueError for diffusion weights in an autoregressive stage (the reverse is how diffusion starts from AR).
    """
    torch.manual_seed(configs.runtime.seed)
    config, weights = replace(configs.shape, **token_ids(tokenizer)), None
    if state:
        config = ModelConfig(**state["config"])
    elif configs.run.load_from:
        config, weights = starting_weights(configs.run.load_from, config, configs.given, fingerprint(tokenizer))
        if objective.autoregressive and not config.autoregressive:
            raise ValueError(
                f"{configs.run.load_from} was trained by diffusion and sees both sides of a token; "
                "an autoregressive stage needs an autoregressive checkpoint; train it on by "
                f"uv run python -m {BY_DIFFUSION[stage]} --load-from {shlex.quote(str(configs.run.load_from))}"
            )
    objective, config = objective.settle(config)
    if weights is None:
        return objective, Transformer(config)
    return objective, build_model(config, weights, str(configs.run.load_from))


def _starting_moments(configs: StageConfigs) -> list[dict]:
    """The optimizer states in --load-from. ValueError if it has none, or those of another optimizer."""
    path = configs.run.load_from
    payload = read_archive(path)
    if not isinstance(payload, dict) or "optimizers" not in payload or "settings" not in payload:
        raise ValueError(f"{path} holds weights only; --resume-optimizer-state needs the run's <run-name>.pt")
    if payload["settings"]["optimizer"] != configs.optim.optimizer:
        raise ValueError(
            f"{path} was trained with --optimizer {payload['settings']['optimizer']}, and its state does not fit "
            f"{configs.optim.optimizer}; give the same one, or leave out --resume-optimizer-state"
        )
    return payload["optimizers"]


def _header(stage: str, model: Transformer, dataset: Any, configs: StageConfigs, state: dict[str, Any] | None) -> str:
    total_steps = configs.trainer.total_steps(len(dataset.train))
    tokens = total_steps * configs.trainer.rows_per_step * dataset.train.seq_len * dataset.train.real_token_share
    source = f", starting from {configs.run.load_from}" if configs.run.load_from else ""
    source = f", resuming after step {state['step']}" if state else source
    return "\n".join(
        [
            f"{stage}: run {configs.run.run_name}{source}",
            f"device {configs.runtime.describe()}{', compiled' if configs.trainer.compile else ''}",
            f"model {model.num_parameters() / 1e6:.1f}M parameters: width {model.config.hidden_size}, "
            f"{model.config.num_hidden_layers} layers, "
            f"{model.config.num_attention_heads} heads, vocabulary {model.config.vocab_size}",
            f"data {dataset.describe()}",
            f"{total_steps:,} steps of {configs.trainer.rows_per_step} rows: {tokens / 1e6:.1f}M tokens, "
            f"{total_steps * configs.trainer.rows_per_step / len(dataset.train):.2f} passes",
        ]
    )
