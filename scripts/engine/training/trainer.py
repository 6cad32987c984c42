"""The one training loop. A stage supplies a model, an objective and rows; nothing here knows what they learn."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from model.checkpoint import load_weights, save_checkpoint
from model.files import is_out_of_memory
from model.forward_process import StepNoise
from model.objective import Objective, RowLoss
from model.transformer import Transformer
from scripts.engine.files import or_none
from scripts.engine.runtime import RuntimeConfig, host_ready, move
from scripts.engine.training.compiling import compile_layers, uncompile
from scripts.engine.training.distributed import ALONE, Replica, World, shards_like, whole
from scripts.engine.training.health import Health, smaller_batch
from scripts.engine.training.loader import Ahead, Rows
from scripts.engine.training.metrics import Meter, RunLog, plot_losses
from scripts.engine.training.optim import (
    MovingAverage,
    OptimConfig,
    load_state,
    lr_at,
    make_optimizers,
    scale_and_clip,
    step_if,
    total_norm,
)
from scripts.engine.training.run import Interrupted, RunConfig, StopSignals
from scripts.engine.training.topk import TopK
from scripts.engine.training.trainer_config import TrainerConfig
from scripts.engine.training.validation import Validation

REMEDY = "start again with a lower --learning-rate or another --dtype"
COUNTERS = ("step", "last_eval", "bad_evals", "best_loss", "best_step", "stop_loss", "seconds", "tokens")


class Trainer:
    """Runs a stage from its first step, or from a saved state, to its end. Everything in the loop depends on
    (seed, step) alone, so on a CPU a resumed run repeats the uninterrupted one bit for bit (CUDA sums in any order).
    The number of processes changes the order of sums, and what dropout drops, but no row, noise or learning rate."""

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        train_rows: Rows,
        val_rows: Rows,
        *,
        optim: OptimConfig,
        trainer: TrainerConfig,
        run: RunConfig,
        runtime: RuntimeConfig,
        identity: dict[str, Any],
        state: dict | None,
        moments: list[dict] | None = None,
        world: World = ALONE,
    ):
        """identity: what every checkpoint of the run says of it: tokenizer, stage, settings, ... state: a saved run;
        moments: without one, the optimizer states of the run that the weights come from."""
        self.optim, self.trainer, self.run, self.runtime, self.identity = optim, trainer, run, runtime, identity
        self.device, self.world = runtime.torch_device, world
        self.model, self.objective = model, objective
        self.replica = Replica(model, world, self.device, trainer.fsdp, runtime.torch_dtype)
        self.train_rows, self.val_rows = train_rows, val_rows
        most = min(len(val_rows), run.eval_max_batches * trainer.batch_size)
        self.validation = Validation(
            self.replica, objective, val_rows, most, trainer.batch_size, train_rows.seq_len, runtime, world
        )
        self.order = train_rows.order(runtime.seed, trainer.rows_per_step)
        self.total_steps = trainer.total_steps(len(train_rows))
        self.parameters = list(model.parameters())
        self.optimizers = make_optimizers(self.model, optim)
        self.average = MovingAverage(self.model, optim.ema_decay) if optim.ema_decay else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=runtime.torch_dtype == torch.float16)
        self.step = self.saved_step = self.last_eval = self.bad_evals = self.best_step = 0
        self.best_loss = self.stop_loss = math.inf
        # What a process has counted; what all of them have is the sum, which _collect brings to the first one.
        self.seconds, self.tokens, self.meter = 0.0, 0, Meter()
        self.health = Health(state.get("health") if state else None)
        self.top = TopK(run, state.get("top", []) if state else [], deletes=world.is_main)
        self.top.require_files()
        if state:
            self._restore(state)
        else:
            for optimizer, saved in zip(self.optimizers, moments or [], strict=False):
                load_state(optimizer, optimizer.state_dict() | {"state": saved["state"]})
        if world.is_main:
            self.log = RunLog(run.path("_log.jsonl"), state["log_lines"] if state else 0)
            if not state:  # --overwrite: files of another run must not pass for this one's
                for path in (run.state_path, run.path("_best.pt"), run.exported_path, run.path("_loss.png")):
                    path.unlink(missing_ok=True)
                self.top.clear()
        if trainer.compile:
            compile_layers(self.model)

    # -- the loop ------------------------------------------------------------------------------------------------

    def fit(self) -> float:
        """Train to the end; returns the best validation loss. Raises Interrupted, saved, on SIGINT and SIGTERM."""
        self.model.train()
        quiet = not (self.world.is_main and sys.stderr.isatty())
        bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=quiet, dynamic_ncols=True)
        with StopSignals(impatient=self.world.control is None) as stop:
            alone = partial(self._stop_waiting, stop) if self.world.size == 1 else None  # others agree between steps
            with Ahead(self._micro_batches(), between=alone) as self.batches:
                self._steps(stop, bar)
            bar.close()
            self.save()
        if self.trainer.compile:  # what comes next, samples, has other shapes at every step
            uncompile(self.model)
        if self.average:
            self.average.swap(self.model)  # from here on the model is what the run stands for
        self._write_weights(self.run.exported_path)
        self._say(f"saved {self.run.exported_path}")
        if self.health.skipped:
            self._say(f"{self.health.skipped} of {self.step} steps were skipped: no finite loss or gradient")
        if self.top.best:
            self._merge()
        self._plot()
        return self.best_loss

    def _steps(self, stop: StopSignals, bar: tqdm) -> None:
        started, already = time.perf_counter(), self.seconds
        window = (started, self.tokens)
        while True:
            if self.last_eval < self.step and (self.step % self.run.eval_interval == 0 or self.finished):
                paused = time.perf_counter()
                self._validate(stop)
                window = (window[0] + time.perf_counter() - paused, window[1])
            if self.finished:
                break
            learning_rate = self._train_step()
            bar.update()
            self.seconds = already + time.perf_counter() - started
            told = self.step % self.run.log_interval == 0 or self.finished
            if told or self.device.type == "cpu":  # elsewhere, to look is to wait
                self._tell_skipped()
            if told:
                self._collect()
                now = time.perf_counter()
                if self.world.is_main:
                    self._log_training(learning_rate, (self.tokens - window[1]) / (now - window[0]), bar)
                window = (now, self.tokens)
            if self.step % self.run.save_interval == 0 or self.step % self.run.eval_interval == 0 or self.finished:
                self.save()
            self._stop_if_asked(stop)

    @property
    def finished(self) -> bool:
        patience = self.trainer.early_stop_patience
        return self.step >= self.total_steps or bool(patience and self.bad_evals >= patience)

    def _train_step(self) -> float:
        """One optimizer step; returns its learning rate. The host does not wait for the device."""
        learning_rate = lr_at(self.step, self.total_steps, self.optim)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        torch.manual_seed(self.runtime.seed * 1_000_003 + self.step + (self.world.rank << 53))  # dropout
        # A constant of about the size of the count, which the last micro-batch completes and _update puts in place.
        nominal = float(self.trainer.rows_per_step * self.train_rows.seq_len)
        scored = torch.zeros(2, device=self.device)  # nats, and the number of what they are the sum of
        averages = []
        self._begun = self.tokens
        for number in range(self.trainer.accumulation_steps):
            prepared, tokens = self._next()
            self.tokens += tokens
            with self.replica.accumulating(last=number + 1 == self.trainer.accumulation_steps), self._advised():
                loss = self._loss(prepared)
                self.scaler.scale(loss.nats.sum() / nominal).backward()
            sums = loss.nats.detach().sum(), loss.count.sum()
            averages += [("loss", *sums), *((name, *pair) for name, pair in loss.averages.items())]
            scored += torch.stack(sums)
        nats, count = self.world.add(scored)
        # Gradients come as the mean over the processes of what is to be their sum.
        with self._advised(saves=False):
            norm, sound = self._update(nominal * self.world.size / count.clamp(min=1), nats)
        if self.world.is_main:  # all have the same
            averages.append(("grad_norm", norm, torch.ones((), device=self.device)))
        for name, total, number in averages:
            self.meter.add(name, total.where(sound, 0), number.where(sound, 0))
        self.step += 1
        self.health.note(self.step, sound)
        return learning_rate

    def _next(self) -> tuple[dict[str, Any], int]:
        """The next micro-batch and its tokens. Where a bad row has been met, what was learnt before it is not lost."""
        try:
            item, error = next(self.batches), None
        except (ValueError, OSError, MemoryError) as fault:
            item, error = (), fault
        if self.world.most(error is not None):
            if self.step > self.saved_step:
                self.tokens = self._begun  # of the step that will not be, nothing is counted
                self.save()
            raise error or SystemExit(1)
        return item

    def _micro_batches(self) -> Iterator[tuple[dict[str, Any], int]]:
        """This process's part of every micro-batch to come, prepared, and its number of tokens."""
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # a thread of its own begins with the first one
        per_step, size = self.trainer.rows_per_step, self.trainer.batch_size
        for step in range(self.step, self.total_steps):
            indices = self.order(step * per_step, per_step)
            for first in range(0, per_step, size):
                rows = self.world.share(first, size)
                batch = self.train_rows.batch(indices[rows])
                tokens = int((batch["input_ids"] != self.model.config.pad_token_id).sum())
                noise = StepNoise(
                    self.runtime.seed, step, per_step, rows.start, self.train_rows.seq_len, step / self.total_steps
                )
                prepared = self.objective.prepare(batch, self.model.config, noise)
                yield host_ready(prepared, self.device), tokens

    def _update(self, scale: torch.Tensor, nats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the step if its loss and gradient are finite; returns the gradient's norm and whether they are."""
        scale_down = self.scaler.is_enabled() and self.scaler.get_scale() > 1  # what overflows may be the scale's doing
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = scale_and_clip(self.parameters, scale, self.optim.grad_clip)
        sound = nats.isfinite() & norm.isfinite()
        for optimizer in self.optimizers:
            if self.scaler.is_enabled():  # which meets infinite gradients on purpose, skips them and scales down
                self.scaler.step(optimizer)
            else:
                step_if(optimizer, sound)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        if self.average and (self.device.type != "cpu" or sound):  # elsewhere, to look is to wait: same weights again
            self.average.update(self.model)
        return norm, nats.isfinite() if scale_down else sound

    def _tell_skipped(self) -> None:
        """Log the steps that were skipped since the last call; ValueError when there are too many in a row."""
        per_step = self.trainer.rows_per_step
        for step in self.health.read():
            order = self.train_rows.order(self.runtime.seed, per_step)  # one of its own: the data thread uses the other
            rows = sorted((order((step - 1) * per_step, per_step) % len(self.train_rows)).tolist())
            if self.world.is_main:
                self.log.write("skipped", step=step, rows=rows)
            shown = f"{', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''}"
            self._say(f"step {step}: loss or gradient not finite, step skipped (training rows {shown}, from 0)")
        if self.health.longest >= self.trainer.max_skipped_steps:
            raise ValueError(self._given_up())

    def _given_up(self) -> str:
        """Save the weights if they are good; what to tell the user. Good weights are finite and give a finite loss on
        the validation rows; without such rows an earlier save, which leads here again, is left."""
        told = f"{self.health.longest} steps in a row, to step {self.step}, had no finite loss or gradient: skipped"
        if not self._weights_are_finite:
            return f"{told}; the weights are not finite{self._holds}; {REMEDY}"
        self.health.in_a_row = 0
        nats, _, _ = self._validation(StopSignals())
        if len(nats) and not math.isfinite(nats.sum()):
            return f"{told}; nor is the loss on the validation rows finite{self._holds}; {REMEDY}"
        if len(nats) or not self.saved_step:
            self.save()
        return (
            f"{told}{self._holds}; look at the rows, by --show-batch --show-step {self.step}, and go on with --resume "
            "must, or with another --dtype, too"
        )

    @property
    def _weights_are_finite(self) -> bool:
        return math.isfinite(total_norm([parameter.detach() for parameter in self.parameters]))

    @property
    def _holds(self) -> str:
        return f"; {self.run.state_path} holds step {self.saved_step}" if self.saved_step else ""

    @contextmanager
    def _advised(self, saves: bool = True) -> Iterator[None]:
        """Where memory does not suffice, the step before is saved, unless something has been changed since, and
        ValueError says with which flags it would."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        else:
            return
        for optimizer in self.optimizers:  # outside of the except clause, which would keep the step's tensors alive
            optimizer.zero_grad(set_to_none=True)
        if saves and self.world.size == 1 and self.step > self.saved_step:
            self.tokens = self._begun
            self.save()
        config = self.trainer
        flags = smaller_batch(config.batch_size, config.accumulation_steps, self.run.eval_max_batches, self.world.size)
        less = f"give {flags}, which trains the same" if flags else "give a smaller model or --max-seq-len"
        more = ", and --resume must" if flags and self.saved_step else ""
        raise ValueError(f"out of memory after step {self.step}{self._holds}; {less}{more}")

    def _loss(self, prepared: dict[str, Any]) -> RowLoss:
        with self.runtime.autocast():
            return self.replica.loss(self.objective, move(prepared, self.device))

    def _validate(self, stop: StopSignals) -> None:
        """Validation loss on fixed rows with fixed noise; keeps the best weights; counts towards an early stop."""
        if self.average:
            self.average.swap(self.model)
        try:
            nats, counts, meter = self._validation(stop)
            self.last_eval = self.step
            if len(nats):
                self._judge(nats, counts, meter)
        finally:
            if self.average:
                self.average.swap(self.model)

    def _validation(self, stop: StopSignals) -> tuple[torch.Tensor, torch.Tensor, Meter]:
        """As `Validation` gives it, of the weights that are in the model now."""
        with self._advised(saves=False):  # the average may be in the model
            return self.validation(lambda: self._stop_if_asked(stop))

    def _merge(self) -> None:
        """<run>_topk_merged.pt: the mean of the best weights, validated like each of them."""
        self.world.most(0)  # the first process has written what all of them now read
        kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self._put_weights(self.top.average(), str(self.run.merged_path))
        nats, counts, _ = self._validation(StopSignals())
        loss, steps = float(nats.sum() / counts.sum()), sorted(step for _, step in self.top.best)
        self._write_weights(self.run.merged_path)
        self.model.load_state_dict(kept)
        if self.world.is_main:
            self.log.write("merge", step=self.step, loss=loss, steps=steps, best_loss=self.best_loss)
        self._say(
            f"merged steps {', '.join(map(str, steps))}: val loss {loss:.4f} {self.objective.unit}, best of them "
            f"{self.top.best[0][0]:.4f}; saved {self.run.merged_path}"
        )

    def _judge(self, nats: torch.Tensor, counts: torch.Tensor, meter: Meter) -> None:
        """Log a validation; called while the validated weights (the average, if there is one) are in the model."""
        loss = float(nats.sum() / counts.sum())
        if not math.isfinite(loss):
            raise ValueError(
                f"the validation loss at step {self.step} is not finite, the weights are spoilt{self._holds}; {REMEDY}"
            )
        spread = (nats - loss * counts).square().sum() * len(nats) / max(len(nats) - 1, 1)
        if loss < self.stop_loss - self.trainer.early_stop_min_delta:
            self.stop_loss, self.bad_evals = loss, 0  # moves on counted improvements only, so that small ones add up
        elif self.objective.schedules_done(
            self.step / self.total_steps
        ):  # what rises before may be the schedule's doing
            self.bad_evals += 1
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, self.step
            self._write_weights(self.run.path("_best.pt"))
        if self.run.topk_merge:
            self.top.offer(loss, self.step, self._write_weights)
        if self.world.is_main:
            self.log.write(
                "eval",
                step=self.step,
                loss=loss,
                standard_error=float(spread.sqrt() / counts.sum()),
                best_loss=or_none(self.best_loss),
                best_step=self.best_step,
                **meter.read(),
            )
        best = f"best_val {self.best_loss:.4f}@{self.best_step}"
        self._say(f"step {self.step}: val loss {loss:.4f} {self.objective.unit}, {best}")
        self._plot()

    def _log_training(self, learning_rate: float, speed: float, bar: tqdm) -> None:
        values = self.meter.read()
        usual = self.health.spike(values["loss"]) if values["loss"] is not None else None
        loss = "none scored" if values["loss"] is None else f"{values['loss']:.4f}"
        self.log.write(
            "train",
            step=self.step,
            **values,
            lr=learning_rate,
            tokens=self.tokens,
            tokens_per_second=round(speed, 1),
            seconds=round(self.seconds, 2),
        )
        best = f", best_val {self.best_loss:.4f}@{self.best_step}" if self.best_step else ""
        left = (self.total_steps - self.step) * self.trainer.rows_per_step * self.tokens_per_row / max(speed, 1e-9)
        self._say(
            f"step {self.step}: train loss {loss}, lr {learning_rate:.2e}{best}, {speed:.0f} tok/s, "
            f"{self.seconds:.0f} s, {left:.0f} s to go"
        )
        if usual:
            self.log.write("spike", step=self.step, loss=values["loss"], median=usual[0], deviation=usual[1])
            self._say(
                f"step {self.step}: the training loss {loss} is far above the {usual[0]:.4f} +- {usual[1]:.4f} of the "
                "log lines before"
            )
        bar.set_postfix(loss=loss, lr=f"{learning_rate:.1e}", tok_s=f"{speed:.0f}")

    @property
    def tokens_per_row(self) -> float:
        return self.tokens / max(self.step * self.trainer.rows_per_step, 1)

    def _say(self, line: str) -> None:
        if self.world.is_main:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def _plot(self) -> None:
        if self.world.is_main:
            plot_losses(self.log.path, self.run.path("_loss.png"))

    def _collect(self) -> None:
        """Bring what the processes have counted to the first one."""
        self.meter, self.tokens = self.meter.gathered(self.world), sum(self.world.gather(self.tokens))

    # -- the files -----------------------------------------------------------------------------------------------

    def save(self) -> None:
        """<run>.pt: everything needed to continue. ValueError, and nothing written, where weights are not finite. Nor
        is anything written while steps are being skipped: what is there leads here again, if need be."""
        self._tell_skipped()
        if self.health.in_a_row and not self.finished:
            return
        if not self._weights_are_finite:
            raise ValueError(f"the weights are not finite at step {self.step}{self._holds}; {REMEDY}")
        self._collect()
        shared = whole(
            {
                "weights": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "average": {"shadow": self.average.shadow, "updates": self.average.updates} if self.average else None,
            },
            keep=self.world.is_main,
        )
        if self.world.is_main:
            self.log.sync()
            counters = {name: getattr(self, name) for name in COUNTERS}
            save_checkpoint(
                self.run.state_path,
                self.model.config,
                **shared,
                **self.identity,
                **counters,
                top=self.top.best,
                log_lines=self.log.lines,
                meter=self.meter.sums,
                health=self.health.state,
                scaler=self.scaler.state_dict(),
            )
            self.top.prune()
        self.saved_step = self.step
        self._say(f"saved {self.run.state_path} (step {self.step})")

    def _restore(self, state: dict[str, Any]) -> None:
        self._put_weights(state["weights"], str(self.run.state_path))
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_state(optimizer, saved)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.saved_step = self.step
        if self.world.is_main:
            self.meter = Meter({k: (a.to(self.device), b.to(self.device)) for k, (a, b) in state["meter"].items()})
        else:
            self.tokens = 0
        if self.average:
            self.average.updates = state["average"]["updates"]
            shadow = shards_like(state["average"]["shadow"], self.average.shadow)
            self.average.shadow = {name: tensor.to(self.device) for name, tensor in shadow.items()}

    def _put_weights(self, weights: dict[str, torch.Tensor], source: str) -> None:
        load_weights(self.model, shards_like(weights, self.model.state_dict()), source)

    def _write_weights(self, path: Path) -> None:
        weights = whole(self.model.state_dict(), keep=self.world.is_main)
        if self.world.is_main:
            save_checkpoint(path, self.model.config, weights, **self.identity, step=self.step, best_loss=self.best_loss)

    def _stop_waiting(self, stop: StopSignals) -> None:
        if stop.number:
            self.tokens = self._begun  # of the step that will not be, nothing is counted
            self._stop_if_asked(stop)

    def _stop_if_asked(self, stop: StopSignals) -> None:
        number = self.world.most(stop.number)
        if number:
            if self.saved_step != self.step:  # the signal came between two checks
                self.save()
            how = "--resume must instead of --overwrite" if self.run.overwrite else "--resume must"
            at = f"stopped at step {self.step} of {self.total_steps}"
            if not self.saved_step:
                self._say(f"{at}; nothing is saved, since steps are being skipped: start again")
            else:
                stood = "" if self.saved_step == self.step else f", saved at step {self.saved_step}"
                self._say(f"{at}{stood}; continue with the same command and {how}")
            raise Interrupted(128 + number)
