"""The one training loop. A stage supplies a model, an objective and rows; nothing here knows what they learn."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model.forward_process import StepNoise
from model.objective import Objective, RowLoss
from model.transformer import Transformer
from scripts.engine.files import or_none
from scripts.engine.runtime import host_ready, move
from scripts.engine.training.compiling import compile_layers, uncompile
from scripts.engine.training.config import StageConfigs
from scripts.engine.training.distributed import ALONE, Replica, World
from scripts.engine.training.guard import Guard, Health, Interrupted, StopRequest, StopSignals
from scripts.engine.training.loader import Ahead, Dataset
from scripts.engine.training.metrics import Meter
from scripts.engine.training.optim import lr_at, scale_and_clip, step_if
from scripts.engine.training.run_files import RunFiles
from scripts.engine.training.state import TrainingState
from scripts.engine.training.validation import Validation


class Trainer:
    """Trains from the first step, or from a saved state, to the end.

    Everything in the loop depends on (seed, step) alone, so on a CPU a resumed run repeats the uninterrupted one bit
    for bit (CUDA sums in any order). The number of processes changes the order of sums, and what dropout drops, but no
    row, noise or learning rate.
    """

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        dataset: Dataset,
        configs: StageConfigs,
        identity: dict[str, Any],
        world: World = ALONE,
    ):
        """identity: what every checkpoint of the run says of it."""
        self.model, self.objective, self.rows = model, objective, dataset.train
        self.configs, self.config, self.run, self.runtime = configs, configs.trainer, configs.run, configs.runtime
        self.world, self.device = world, configs.runtime.torch_device
        self.replica = Replica(model, world, self.device, self.config.fsdp, self.runtime.torch_dtype)
        self.state = TrainingState(model, configs.optim, self.runtime, world)
        self.files = RunFiles(self.run, self.state, identity)
        self.guard = Guard(self.state, self.files, configs, self.rows)
        self.validation = Validation(self.replica, objective, dataset, configs, world)
        self.order = self.rows.order(self.runtime.seed, self.config.rows_per_step)
        self.total_steps = self.config.total_steps(len(self.rows))
        self.signals = StopSignals(world)

    def start(self, moments: list[dict] | None = None) -> None:
        """Begin a new run; moments: the optimizer states of the run that the weights come from."""
        if moments:
            self.state.load_moments(moments)
        self.files.start()

    def resume(self, saved: dict[str, Any]) -> None:
        """Continue a run from its checkpoint."""
        self.guard.health = Health(saved.get("health"))
        self.files.resume(saved)

    # -- the loop ------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        return self.state.progress.step

    @property
    def finished(self) -> bool:
        patience = self.config.early_stop_patience
        return self.step >= self.total_steps or bool(patience and self.state.progress.bad_evals >= patience)

    def fit(self) -> float:
        """Train to the end; return the best validation loss. Raises Interrupted, once saved, on SIGINT and SIGTERM."""
        self.model.train()
        if self.config.compile:
            compile_layers(self.model)
        quiet = not (self.world.is_main and sys.stderr.isatty())
        between = self.signals.check if self.world.size == 1 else None  # several processes agree between steps
        bar = tqdm(total=self.total_steps, initial=self.step, unit="step", disable=quiet, dynamic_ncols=True)
        with self.signals, bar as self.bar:
            try:
                with Ahead(self._micro_batches(), between=between) as self.batches:
                    self._run_steps()
            except StopRequest as request:
                self._stop(request.number)
            self.save()
        self._finish()
        return self.state.progress.best_loss

    def _run_steps(self) -> None:
        """Validate, step, log and save in turn until the run is finished."""
        progress, run = self.state.progress, self.run
        started = time.perf_counter() - progress.seconds
        window_start, window_tokens = time.perf_counter(), progress.tokens
        while True:
            if progress.last_eval < self.step and (self.step % run.eval_interval == 0 or self.finished):
                paused = time.perf_counter()
                self._validate()
                window_start += time.perf_counter() - paused
            if self.finished:
                return
            learning_rate = self._train_step()
            self.bar.update()
            progress.seconds = time.perf_counter() - started
            logs = self.step % run.log_interval == 0 or self.finished
            if logs or self.device.type == "cpu":  # reading the flags of a GPU would synchronise
                self._check_skipped()
            if logs:
                self.state.collect()
                now = time.perf_counter()
                if self.world.is_main:
                    self._log_training(learning_rate, (progress.tokens - window_tokens) / (now - window_start))
                window_start, window_tokens = now, progress.tokens
            # The last step is saved by `fit`, once it has been validated.
            if not self.finished and (self.step % run.save_interval == 0 or self.step % run.eval_interval == 0):
                self.save()
            self._stop_if_asked()

    # -- a step --------------------------------------------------------------------------------------------------

    def _train_step(self) -> float:
        """Take one optimizer step; return its learning rate. The host does not wait for the device."""
        progress, state = self.state.progress, self.state
        learning_rate = lr_at(self.step, self.total_steps, self.configs.optim)
        for optimizer in state.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        torch.manual_seed(self.runtime.seed * 1_000_003 + self.step + (self.world.rank << 53))  # dropout
        # The gradient is that of the mean over the tokens of all micro-batches, whose number is known only after the
        # last one. Until then sums are divided by a constant of about that size; `_update` puts it in its place.
        nominal = float(self.config.rows_per_step * self.rows.seq_len)
        scored = torch.zeros(2, device=self.device)  # nats, and the number of what they are the sum of
        averages, tokens = [], 0
        for number in range(self.config.accumulation_steps):
            prepared, num_tokens = self._next()
            tokens += num_tokens
            last = number + 1 == self.config.accumulation_steps
            with self.replica.accumulating(last), self.guard.memory(self._save_if_alone):
                loss = self._loss(prepared)
                state.scaler.scale(loss.nats.sum() / nominal).backward()
            sums = loss.nats.detach().sum(), loss.count.sum()
            averages += [("loss", *sums), *((name, *pair) for name, pair in loss.averages.items())]
            scored += torch.stack(sums)
        nats, count = self.world.add(scored)
        # The processes' gradients have been averaged, and are to be summed: hence times their number.
        with self.guard.memory():
            norm, sound = self._update(nominal * self.world.size / count.clamp(min=1), nats)
        if self.world.is_main:  # all have the same
            averages.append(("grad_norm", norm, torch.ones((), device=self.device)))
        for name, total, number in averages:
            state.meter.add(name, total.where(sound, 0), number.where(sound, 0))
        progress.step += 1
        progress.tokens += tokens
        self.guard.health.note(self.step, sound)
        return learning_rate

    def _next(self) -> tuple[dict[str, Any], int]:
        """Return the next micro-batch and its tokens; at a bad row, save what was learnt before it."""
        try:
            item, fault = next(self.batches), None
        except (ValueError, OSError, MemoryError) as error:
            item, fault = ({}, 0), error
        if self.world.most(fault is not None):
            self._save_if_new()
            raise fault or SystemExit(1)
        return item

    def _micro_batches(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Yield this process's part of every micro-batch to come, prepared, and its number of tokens."""
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)  # a new thread begins with the first one
        per_step, size = self.config.rows_per_step, self.config.batch_size
        for step in range(self.step, self.total_steps):
            indices, progress = self.order(step * per_step, per_step), step / self.total_steps
            for first in range(0, per_step, size):
                rows = self.world.share(first, size)
                batch = self.rows.batch(indices[rows])
                tokens = int((batch["input_ids"] != self.model.config.pad_token_id).sum())
                noise = StepNoise(self.runtime.seed, step, per_step, rows.start, self.rows.seq_len, progress)
                prepared = self.objective.prepare(batch, self.model.config, noise)
                yield host_ready(prepared, self.device), tokens

    def _loss(self, prepared: dict[str, Any]) -> RowLoss:
        with self.runtime.autocast():
            return self.replica.loss(self.objective, move(prepared, self.device))

    def _update(self, scale: Tensor, nats: Tensor) -> tuple[Tensor, Tensor]:
        """Take the step if its loss and gradient are finite; return the gradient's norm and whether they are."""
        state, scaler = self.state, self.state.scaler
        scale_to_blame = scaler.is_enabled() and scaler.get_scale() > 1  # for a gradient that overflows
        for optimizer in state.optimizers:
            scaler.unscale_(optimizer)
        norm = scale_and_clip(state.parameters, scale, self.configs.optim.grad_clip)
        sound = nats.isfinite() & norm.isfinite()
        for optimizer in state.optimizers:
            if scaler.is_enabled():  # which meets infinite gradients on purpose, skips them and scales down
                scaler.step(optimizer)
            else:
                step_if(optimizer, sound)
            optimizer.zero_grad(set_to_none=True)
        scaler.update()
        # After a skipped step a GPU averages the same weights again: to look at `sound` would synchronise.
        if state.average and (self.device.type != "cpu" or sound):
            state.average.update(self.model)
        return norm, nats.isfinite() if scale_to_blame else sound

    def _check_skipped(self) -> None:
        """Report the steps that were skipped; raise ValueError if there are too many in a row."""
        self.guard.report_skipped()
        if self.guard.health.longest >= self.config.max_skipped_steps:
            self.guard.give_up(validate=lambda: self._measure()[0], save=self.save)

    # -- validation ----------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Measure the validation loss, of the moving average if there is one, and judge it."""
        if self.finished:  # at earlier steps `save` has checked them
            self.guard.require_finite_weights()
        self.state.swap_average()
        try:
            nats, counts, meter = self._measure(self.signals.check)
            self.state.progress.last_eval = self.step
            if len(nats):
                self._judge(nats, counts, meter)
        finally:
            self.state.swap_average()

    def _measure(self, between: Callable[[], None] = lambda: None) -> tuple[Tensor, Tensor, Meter]:
        """Validate the weights that are in the model now."""
        with self.guard.memory():
            return self.validation(between)

    def _judge(self, nats: Tensor, counts: Tensor, meter: Meter) -> None:
        """Log a validation, count towards an early stop, and write the weights, which are in the model, if they are the
        best or among the best."""
        progress, loss = self.state.progress, float(nats.sum() / counts.sum())
        self.guard.require_finite_loss(loss)
        values = meter.read()
        variance = (nats - loss * counts).square().sum() * len(nats) / max(len(nats) - 1, 1)
        if loss < progress.stop_loss - self.config.early_stop_min_delta:
            # Moves on improvements that count alone, so that small ones add up.
            progress.stop_loss, progress.bad_evals = loss, 0
        elif self.objective.schedules_done(self.step / self.total_steps):  # before, the schedules may raise it
            progress.bad_evals += 1
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step = loss, self.step
            self.files.write_weights(self.run.best_path)
        if self.run.topk_merge:
            self.files.top.offer(loss, self.step, self.files.write_weights)
        self.files.record(
            "eval",
            step=self.step,
            loss=loss,
            standard_error=float(variance.sqrt() / counts.sum()),
            best_loss=or_none(progress.best_loss),
            best_step=progress.best_step,
            **values,
        )
        best = f"best_val {progress.best_loss:.4f}@{progress.best_step}"
        terms = self._terms(values)
        self.files.say(f"step {self.step}: val loss {loss:.4f}{terms} {self.objective.unit}, {best}")
        self.files.plot()

    # -- log, files and end --------------------------------------------------------------------------------------

    def _log_training(self, learning_rate: float, tokens_per_second: float) -> None:
        progress, values = self.state.progress, self.state.meter.read()
        loss = "none scored" if values["loss"] is None else f"{values['loss']:.4f}"
        self.files.record(
            "train",
            step=self.step,
            **values,
            lr=learning_rate,
            tokens=progress.tokens,
            tokens_per_second=round(tokens_per_second, 1),
            seconds=round(progress.seconds, 2),
        )
        best = f", best_val {progress.best_loss:.4f}@{progress.best_step}" if progress.best_step else ""
        seconds_left = (self.total_steps - self.step) * progress.tokens / self.step / max(tokens_per_second, 1e-9)
        self.files.say(
            f"step {self.step}: train loss {loss}{self._terms(values)}, lr {learning_rate:.2e}{best}, "
            f"{tokens_per_second:.0f} tok/s, {progress.seconds:.0f} s, {seconds_left:.0f} s to go"
        )
        usual = None if values["loss"] is None else self.guard.health.spike(values["loss"])
        if usual:
            median, deviation = usual
            self.files.record("spike", step=self.step, loss=values["loss"], median=median, deviation=deviation)
            self.files.say(
                f"step {self.step}: the training loss {loss} is far above the {median:.4f} +- {deviation:.4f} of the "
                "log lines before"
            )
        self.bar.set_postfix(loss=loss, lr=f"{learning_rate:.1e}", tok_s=f"{tokens_per_second:.0f}")

    def _terms(self, values: dict[str, Any]) -> str:
        """Return the averages that the objective names, in words; of a validation only the first process has them."""
        known = [name for name in self.objective.terms if values.get(name) is not None]
        terms = ", ".join(f"{name.replace('_', ' ')} {values[name]:.4f}" for name in known)
        return f" ({terms})" if terms else ""

    def save(self) -> None:
        """Save the run; raise ValueError instead if the weights are not finite.

        Nothing is written while steps are being skipped: the previous checkpoint can replay them.
        """
        self._check_skipped()
        if self.guard.health.in_a_row and not self.finished:
            return
        self.guard.require_finite_weights()
        self.files.save(health=self.guard.health.state)

    def _save_if_new(self) -> None:
        if self.step > self.files.saved_step:
            self.save()

    def _save_if_alone(self) -> None:
        """Save after an error that the other processes know nothing of: they would wait in vain."""
        if self.world.size == 1:
            self._save_if_new()

    def _stop_if_asked(self) -> None:
        self.signals.check()

    def _stop(self, number: int) -> None:
        """Save, say how to continue, and end the run."""
        self._save_if_new()
        how = "--resume must instead of --overwrite" if self.run.overwrite else "--resume must"
        stop, saved = f"stopped at step {self.step} of {self.total_steps}", self.files.saved_step
        if not saved:
            self.files.say(f"{stop}; nothing is saved, since steps are being skipped: start again")
        else:
            where = "" if saved == self.step else f", saved at step {saved}"
            self.files.say(f"{stop}{where}; continue with the same command and {how}")
        raise Interrupted(128 + number)

    def _finish(self) -> None:
        """Leave in the model, and write, what the run stands for."""
        if self.config.compile:  # what comes next, samples, has other shapes at every step
            uncompile(self.model)
        self.state.swap_average()
        self.files.write_weights(self.run.exported_path)
        self.files.say(f"saved {self.run.exported_path}")
        if self.guard.health.skipped:
            self.files.say(f"{self.guard.health.skipped} of {self.step} steps were skipped: no finite loss or gradient")
        if self.files.top.best:
            self._merge()
        self.files.plot()

    def _merge(self) -> None:
        """Write <run>_topk_merged.pt: the mean of the best weights, validated like each of them."""
        self.world.barrier()  # the first process has written what all of them now read
        weights = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.state.load_weights(self.files.top.average(), str(self.run.merged_path))
        nats, counts, _ = self._measure()
        loss, best = float(nats.sum() / counts.sum()), self.files.top.best
        self.files.write_weights(self.run.merged_path)
        self.model.load_state_dict(weights)
        steps = sorted(step for _, step in best)
        best_loss = self.state.progress.best_loss
        self.files.record("merge", step=self.step, loss=loss, steps=steps, best_loss=best_loss)
        self.files.say(
            f"merged steps {', '.join(map(str, steps))}: val loss {loss:.4f} {self.objective.unit}, best of them "
            f"{best[0][0]:.4f}; saved {self.run.merged_path}"
        )
