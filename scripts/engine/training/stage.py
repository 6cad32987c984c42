"""What all training stages share: refuse or open the run, find the starting weights, say what will happen, train."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dataset.entries import require_same_entries
from dataset.tokenizer import PreTrainedTokenizerFast, fingerprint, token_ids
from model.checkpoint import load_checkpoint
from model.config import ModelConfig
from model.import_weights import StartingWeights, starting_weights
from model.objective import Objective
from model.transformer import Transformer
from scripts.engine.files import locked, require_output, require_writable
from scripts.engine.flags import defaults_of, settings_of
from scripts.engine.runtime import command_line, keep_freed_memory, provenance
from scripts.engine.training.config import StageConfigs
from scripts.engine.training.distributed import World
from scripts.engine.training.loader import Dataset
from scripts.engine.training.preview import dry_run, show_batch
from scripts.engine.training.run import compare_settings, continues
from scripts.engine.training.trainer import Trainer

# For weights that an autoregressive stage cannot start from: what trains them on.
BY_DIFFUSION = {
    "scripts.train.train_pretrain": "scripts.train.diffusion --train",
    "scripts.train.train_sft_minimind": "scripts.train.train_sft_diffusion",
    "scripts.train.train_dpo_minimind": "scripts.train.train_dpo_diffusion",
}


@dataclass
class Stage:
    """A training command at work. Inside `opened` the model is settled; then a dataset is built, and trained on:

    stage = Stage("scripts.train.train_pretrain", configs, NextToken(), data, tokenizer)
    with stage.opened():
        stage.train(stage.build(PretrainDataset))
    """

    name: str  # the command's module
    configs: StageConfigs
    objective: Objective
    data: Any  # group of flags that says what to train on; its `data` and `max_seq_len` are used here
    tokenizer: PreTrainedTokenizerFast
    chat: bool = False  # trains on conversations, so that prompts of its weights get the chat template
    start: StartingWeights | None = None  # the weights of --load-from, if they have been read already

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Hold the run's files, and settle everything that needs no data.

        Raises ValueError if another command holds them, a flag is wrong, or the weights do not fit. Sets `world`;
        `state`, the saved run that is continued; `model`, whose config is that of the weights to come; and `moments`,
        optimizer states to start from.
        """
        run = self.configs.run
        with World.opened(self.configs.runtime.torch_device) as self.world, self._files_held():
            self.state = load_checkpoint(run.state_path) if not run.previewing and continues(run) else None
            if self.state:
                self._warm_up(self.state.get("settings", {}).get("warmup_steps", self.configs.optim.warmup_steps))
            self.settings, self.changes = self._settings(), []
            if self.state:
                self.changes = self._check_continuation()
            self.moments = None
            self.model = self._starting_model()
            self.model.set_context(self.data.max_seq_len)
            self.start = None
            yield

    @contextmanager
    def _files_held(self) -> Iterator[None]:
        """Keep other commands from writing the run. ValueError if one does, or if its files cannot be written."""
        run, data = self.configs.run, self.data
        require_writable(run.state_path, "--save-dir")
        require_output(run.exported_path, "--weights-path", data.data, data.tokenizer_dir, run.load_from)
        with locked(run.lock_path) if self.world.is_main and not run.previewing else nullcontext():
            self.world.barrier()  # only now may the others look at what is there
            yield

    @property
    def groups(self) -> tuple:
        """All groups of flags."""
        configs = self.configs
        return configs.shape, configs.optim, configs.trainer, configs.run, configs.runtime, self.objective, self.data

    def _settings(self) -> dict[str, Any]:
        return settings_of(*self.groups)

    def _warm_up(self, steps: int) -> None:
        """Make `steps` the length of the warm-up, unless --warmup-steps was typed."""
        if "warmup_steps" not in self.configs.given:
            self.configs = replace(self.configs, optim=replace(self.configs.optim, warmup_steps=steps))

    # -- the model ----------------------------------------------------------------------------------------------

    def _starting_model(self) -> Transformer:
        """Settle the objective; return the saved run's model, that of --load-from, or a new one seeded by --seed.

        Raises ValueError for weights of diffusion alone in an autoregressive stage; diffusion does start from AR ones.
        """
        configs, path = self.configs, self.configs.run.load_from
        torch.manual_seed(configs.runtime.seed)
        config, start = replace(configs.shape, **token_ids(self.tokenizer)), None
        if self.state:
            config = ModelConfig(**self.state["config"])
        elif path:
            start = self.start or read_start(path, configs, self.tokenizer)
            config = start.config
            if self.objective.autoregressive and "autoregressive" not in config.kinds:
                raise ValueError(
                    f"{path} was trained by diffusion and sees both sides of a token; "
                    "an autoregressive stage needs an autoregressive checkpoint; train it on by "
                    f"uv run python -m {BY_DIFFUSION[self.name]} --load-from {shlex.quote(str(path))}"
                )
        self.objective, config = self.objective.settle(config)
        if start is None:
            return Transformer(config)
        if configs.run.resume_optimizer_state:
            self.moments = self._moments(start)
        return start.model(config)

    def _moments(self, start: StartingWeights) -> list[dict]:
        """Return the optimizer states in --load-from; raise ValueError if it has none, or another optimizer's."""
        payload, optimizer = start.payload, self.configs.optim.optimizer
        if "optimizers" not in payload or "settings" not in payload:
            raise ValueError(f"{start.path} holds weights only; --resume-optimizer-state needs the run's <run-name>.pt")
        if payload["settings"]["optimizer"] != optimizer:
            raise ValueError(
                f"{start.path} was trained with --optimizer {payload['settings']['optimizer']}, and its state does not "
                f"fit {optimizer}; give the same one, or leave out --resume-optimizer-state"
            )
        return payload["optimizers"]

    # -- the saved run -------------------------------------------------------------------------------------------

    def _check_continuation(self) -> list[str]:
        """Return lines on settings that differ harmlessly from those of the saved run; raise ValueError if it is
        another stage's, has no training state, or had other settings."""
        state, run = self.state, self.configs.run
        if state["stage"] != self.name:
            raise ValueError(
                f"{run.state_path} is a run of {state['stage']}, not of {self.name}: go on with it by "
                f"uv run python -m {state['stage']} --run-name {run.run_name} --resume must, "
                "or choose another --run-name, and --load-from for its weights"
            )
        if "step" not in state or "optimizers" not in state:
            raise ValueError(f"{run.state_path} holds weights only; resume from the run's own <run-name>.pt")
        if state["tokenizer"] != fingerprint(self.tokenizer):
            raise ValueError(
                f"{run.state_path} was trained with another tokenizer; give its directory with --tokenizer-dir"
            )
        # Flags that came after the run was saved had their defaults; but nothing stood behind a document's EOS then.
        in_blocks = state["config"]["block_size"] > 0
        defaults = defaults_of(*self.groups) | ({"quantize_effective_length": False} if in_blocks else {"eos_fill": 0})
        defaults = {name: value for name, value in defaults.items() if name in self.settings}
        return compare_settings(defaults | state["settings"], self.settings, run.state_path)

    def _check_dataset(self, dataset: Dataset) -> None:
        """Raise ValueError if it has no rows that an early stop needs, or is not what the saved run was trained on."""
        path, data = self.configs.run.state_path, dataset.meta
        saved = self.state["data"] if self.state else data
        if self.configs.trainer.early_stop_patience and not len(dataset.validation):
            raise ValueError("--early-stop-patience needs validation rows, and there are none; raise --val-fraction")
        if saved["data_sha256"] != data["data_sha256"]:
            raise ValueError(
                f"{path} was trained on other contents of {dataset.source}; "
                "give the same file, or choose another --run-name"
            )
        if saved.get("reference_sha256") != data.get("reference_sha256"):
            raise ValueError(
                f"{path} was tuned against another reference; "
                "give the same weights with --reference-from, or choose another --run-name"
            )

    # -- data and training ---------------------------------------------------------------------------------------

    def build(self, dataset_class: Callable, **options: Any) -> Any:
        """Return the dataset, which the first process builds before the others, so that caches are made once."""
        return self.world.main_first(lambda: dataset_class(self.data, self.tokenizer, **options))

    def train(self, dataset: Dataset, before: Callable[[], None] = lambda: None) -> Transformer | None:
        """Train; return the model, or None after --dry-run or --show-batch, and in all processes but the first.

        before() is called on the first process when
        nothing can be refused any more: what else a stage writes, it writes there.
        """
        self._check_dataset(dataset)
        if not self.state:  # a run that goes on keeps the warm-up that it began with, however long it is to be
            total_steps = self.configs.trainer.total_steps(len(dataset.train))
            self._warm_up(min(self.configs.optim.warmup_steps, total_steps // 10))
            self.settings["warmup_steps"] = self.configs.optim.warmup_steps
        if self.world.is_main:
            print(self._header(dataset), flush=True)
            for change in self.changes:
                print(f"resuming with another setting: {change}")
        keep_freed_memory()
        if self.configs.run.previewing:
            if self.world.is_main:
                self._preview(dataset)
            return None
        identity = {
            "tokenizer": fingerprint(self.tokenizer),
            "stage": self.name,
            "chat": self.chat,
            "unit": self.objective.unit,
            "settings": self.settings,
            "data": dataset.meta,
            "command": command_line(self.name, self.configs.argv),
            "provenance": provenance(self.configs.runtime),
        }
        if self.world.is_main:
            before()
        return self._fit(dataset, identity)

    def _preview(self, dataset: Dataset) -> None:
        if self.configs.run.show_batch:
            show_batch(self.model.config, self.objective, dataset.train, self.configs, self.tokenizer)
        if self.configs.run.dry_run:
            dry_run(self.model, self.objective, dataset.train, self.configs)

    def _fit(self, dataset: Dataset, identity: dict[str, Any]) -> Transformer | None:
        trainer = Trainer(self.model, self.objective, dataset, self.configs, identity, self.world)
        if self.state:
            trainer.resume(self.state)
        else:
            trainer.start(self.moments)
        event, self.state, self.moments = "resume" if self.state else "start", None, None
        trainer.files.record(
            event,
            step=trainer.step,
            total_steps=trainer.total_steps,
            parameters=self.model.num_parameters(),
            config=asdict(self.model.config),
            **identity,
        )
        trainer.fit()
        model = self.model
        if self.configs.trainer.fsdp:  # what comes next has one process to itself
            weights, context = trainer.state.weights(), model.context_length
            if self.world.is_main:
                model = Transformer(model.config)
                model.load_state_dict(weights)
                model.to(self.configs.runtime.torch_device).context_length = context
        return model if self.world.is_main else None

    def _header(self, dataset: Dataset) -> str:
        configs, rows, config = self.configs, dataset.train, self.model.config
        total_steps, per_step = configs.trainer.total_steps(len(rows)), configs.trainer.rows_per_step
        tokens = total_steps * per_step * rows.seq_len * rows.real_token_share
        source = f", starting from {configs.run.load_from}" if configs.run.load_from else ""
        source = f", resuming after step {self.state['step']}" if self.state else source
        return "\n".join(
            [
                f"{self.name}: run {configs.run.run_name}{source}",
                f"device {configs.runtime.describe()}{', compiled' if configs.trainer.compile else ''}",
                f"model {self.model.num_parameters() / 1e6:.1f}M parameters: width {config.hidden_size}, "
                f"{config.num_hidden_layers} layers, "
                f"{config.num_attention_heads} heads, vocabulary {config.vocab_size}{_stretching(config)}",
                f"data {dataset.describe()}",
                f"{total_steps:,} steps of {per_step} rows: {tokens / 1e6:.1f}M tokens, "
                f"{total_steps * per_step / len(rows):.2f} passes",
                f"learning rate {self._warmup(total_steps)}",
            ]
        )

    def _warmup(self, total_steps: int) -> str:
        """Return what the learning rate of the run begins with."""
        optim = self.configs.optim
        if optim.warmup_steps >= total_steps:
            return (
                f"below {optim.learning_rate:g} to the end: the run of {total_steps:,} steps ends within its warm-up "
                f"of {optim.warmup_steps:,}"
            )
        settled = "warmup_steps" not in self.configs.given and optim.warmup_steps == total_steps // 10
        tenth = ", a tenth of the run, since --warmup-steps was left out" if settled else ""
        return f"{optim.learning_rate:g} after a warm-up of {optim.warmup_steps:,} steps{tenth}"


def read_start(path: Path, configs: StageConfigs, tokenizer: PreTrainedTokenizerFast) -> StartingWeights:
    """Return the weights in `path`, a file or a folder of Hugging Face's.

    Raises ValueError if they do not fit the flags or the tokenizer. Checkpoints of ours name their tokenizer. Foreign
    weights do not, so that it must be typed; a tokenizer.json beside them must have its entries.
    """
    shape = replace(configs.shape, **token_ids(tokenizer))
    start = starting_weights(path, shape, configs.given, fingerprint(tokenizer))
    if start.foreign:
        folder = path if path.is_dir() else path.parent
        file = folder / "tokenizer.json"
        if "tokenizer_dir" not in configs.given:
            place = folder if file.is_file() else "DIR"
            raise ValueError(
                f"{path} does not say which tokenizer its weights were trained with; "
                f"give its directory: --tokenizer-dir {place}"
            )
        if file.is_file():
            require_same_entries(tokenizer, file)
    return start


def _stretching(config: ModelConfig) -> str:
    """Return what --inference-rope-scaling does to rotary positions, if it is on."""
    if not config.inference_rope_scaling:
        return ""
    lengths = f"in contexts of more than {config.rope_original_length} tokens"
    lengths = "at every length, as MiniMind does" if config.rope_variant == "minimind" else lengths
    return f", rotary positions stretched {config.rope_factor:g}-fold {lengths}"


def require_start(configs: StageConfigs, example: str) -> None:
    """Raise ValueError without --load-from: fine-tuning random weights is nearly always a forgotten flag."""
    if configs.run.load_from is None:
        raise ValueError(f"--load-from is missing: give the pretrained weights to start from, such as {example}")
