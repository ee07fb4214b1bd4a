"""The training loop."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from savl.atomic_write import write_atomically
from savl.inference.device import best_device
from savl.network import SAVL
from savl.training.checkpoint import load_checkpoint, save_checkpoint
from savl.training.config import TrainingConfig
from savl.training.data import Batch, PatchSource
from savl.training.objectives import Objective
from savl.weights import save

CHECKPOINT_NAME = "checkpoint.pt"
LOG_NAME = "log.jsonl"
WEIGHTS_NAME = "model.safetensors"


class Trainer:
    """Train one network by one configuration, from scratch or from the run folder's checkpoint.

    A run is a pure function of its configuration: batches and samples follow from (seed, step), so stopping and
    resuming gives the numbers of a run that never stopped.
    """

    def __init__(
        self,
        config: TrainingConfig,
        source: Callable[[int], Batch] | None = None,
        on_image: Callable[[int, int], None] | None = None,
    ) -> None:
        """Build everything and pick up the checkpoint if there is one.

        Args:
            config: The run.
            source: Gives the batch of a step; by default a `PatchSource` over ``config.data.hr``.
            on_image: Told (decoded so far, total) while the images are decoded.

        Raises:
            ValueError: The data cannot serve, or the checkpoint is damaged or belongs to another run.
        """
        self.config = config
        self.output = Path(config.run.output)
        self.device = best_device()
        torch.manual_seed(config.run.seed)
        self.model = SAVL(config.model).to(self.device).train()
        self.objective = Objective(self.model, config.objective).to(self.device).train()
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.optimizer.ema))
        self.parameters: list[nn.Parameter] = [*self.model.parameters(), *self.objective.parameters()]
        self.optimizer = torch.optim.Adam(
            self.parameters, lr=config.optimizer.learning_rate, betas=config.optimizer.betas
        )
        self.step = 0
        self._stopping = False
        if (self.output / CHECKPOINT_NAME).exists():
            self._resume(load_checkpoint(self.output / CHECKPOINT_NAME))
        self.source = source or PatchSource(
            config.data.hr,
            patch=config.data.patch,
            batch=config.data.batch,
            scale=config.model.scale,
            seed=config.run.seed,
            degradation=config.degradation,
            on_image=on_image,
        )

    def train(self, on_step: Callable[[int, dict[str, float]], None] | None = None) -> Path | None:
        """Run to the end, or until `stop`.

        Args:
            on_step: Told (steps done, losses) after each step.

        Returns:
            Path of the exported averaged weights (savl safetensors); None if the run was stopped before its end.

        Raises:
            FloatingPointError: Loss or gradient is not finite; weights and checkpoint stay as they were.
        """
        run = self.config.run
        self._stopping = False
        self.output.mkdir(parents=True, exist_ok=True)
        started, logged = time.monotonic(), self.step
        with ThreadPoolExecutor(max_workers=1) as pool:  # the next batch is prepared while this one is learned from
            upcoming = pool.submit(self.source, self.step)
            while self.step < run.steps and not self._stopping:
                batch = upcoming.result()
                upcoming = pool.submit(self.source, self.step + 1)
                rate = self._learning_rate()
                losses = self._step(batch, rate)
                self.step += 1
                if self.step % run.log_every == 0 or self.step == run.steps:
                    speed = (self.step - logged) / max(time.monotonic() - started, 1e-9)
                    self._log({"step": self.step, "steps_per_second": speed, "lr": rate, **losses})
                    started, logged = time.monotonic(), self.step
                if self.step % run.checkpoint_every == 0 or self.step == run.steps:
                    self.checkpoint()
                if on_step is not None:
                    on_step(self.step, losses)
        if self.step < run.steps:
            self.checkpoint()
            return None
        return self.export()

    def stop(self) -> None:
        """Ask `train` to finish the step in hand, write a checkpoint and return. Safe to call from a signal handler."""
        self._stopping = True

    def checkpoint(self) -> None:
        """Write the state of the run, atomically."""
        state: dict[str, Any] = {
            "step": self.step,
            "settings": _settings_that_count(self.config),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        save_checkpoint(self.output / CHECKPOINT_NAME, state)

    def export(self) -> Path:
        """Write the averaged weights as a file that `savl.load` reads."""
        path = self.output / WEIGHTS_NAME
        averaged = SAVL(self.config.model)
        averaged.load_state_dict(self.average.module.state_dict())
        save(averaged, path)
        return path

    def _step(self, batch: Batch, learning_rate: float) -> dict[str, float]:
        batch = Batch(batch.y.to(self.device), batch.x.to(self.device), batch.z.to(self.device))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        # A seed of its own per step: for the posterior's sample, and for stochastic depth, which draws from torch.
        seed = (self.config.run.seed << 32) + self.step
        torch.manual_seed(seed)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.bfloat16):
            losses = self.objective(self.model, batch, seed)
        if not torch.isfinite(losses.total):
            raise FloatingPointError(
                f"step {self.step}: the loss is {float(losses.total.detach())}: {losses.to_log()}; lower "
                f"optimizer.learning_rate, or check the data"
            )
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.clip)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"step {self.step}: the gradient is not finite, at a loss of {losses.to_log()}; lower "
                f"optimizer.learning_rate, or check the data"
            )
        self.optimizer.step()
        self.average.update_parameters(self.model)
        log: dict[str, float] = losses.to_log()
        return log

    def _learning_rate(self) -> float:
        settings = self.config.optimizer
        if self.step < settings.warmup:
            return settings.learning_rate * (self.step + 1) / settings.warmup
        done = (self.step - settings.warmup) / max(self.config.run.steps - settings.warmup, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
        return settings.learning_rate * (settings.final_fraction + (1 - settings.final_fraction) * cosine)

    def _resume(self, state: dict[str, Any]) -> None:
        path = self.output / CHECKPOINT_NAME
        try:
            then, now = state["settings"], _settings_that_count(self.config)
            changed = [name for name in now if now[name] != then.get(name)]
            if changed:
                what = ", ".join(f"{name} was {then.get(name)!r} and is {now[name]!r}" for name in changed)
                raise ValueError(f"{path} belongs to another run: {what}; choose another run.output, or set them back")
            if self.config.run.steps < state["step"]:
                raise ValueError(
                    f"run.steps must be at least {state['step']}, the steps {path} has done already, "
                    f"got {self.config.run.steps}"
                )
            self.step = state["step"]
            self.model.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.objective.load_state_dict(state["objective"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be resumed from: {error}") from error
        # What was logged after the checkpoint was written will be done, and logged, again.
        log = self.output / LOG_NAME
        if log.exists():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            write_atomically(log, "".join(kept).encode())

    def _log(self, line: dict[str, Any]) -> None:
        with open(self.output / LOG_NAME, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _settings_that_count(config: TrainingConfig) -> dict[str, Any]:
    """What a resumed run must share with the one it resumes: all but its length, its rhythm and where files lie."""
    free = {"run.steps", "run.log_every", "run.checkpoint_every", "run.output", "data.hr"}
    flat = {f"{table}.{name}": value for table, values in config.to_dict().items() for name, value in values.items()}
    return {name: value for name, value in flat.items() if name not in free}
