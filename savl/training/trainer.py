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
            ValueError: The data cannot serve, or the checkpoint belongs to another network.
        """
        self.config = config
        self.output = Path(config.run.output)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
        self.output.mkdir(parents=True, exist_ok=True)
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
            FloatingPointError: The loss is not finite; the last checkpoint stays as it was.
        """
        run = self.config.run
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
            "model_config": self.config.model.to_dict(),
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
        # A seed of its own per step, clear of the data's stream: Philox keys need only differ.
        seed = (self.config.run.seed << 32) + self.step
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.run.bfloat16):
            losses = self.objective(self.model, batch, seed)
        if not torch.isfinite(losses.total):
            raise FloatingPointError(
                f"step {self.step}: the loss is {float(losses.total.detach())}: {losses.to_log()}; lower "
                f"optimizer.learning_rate, or check the data"
            )
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.clip)
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
        if state["model_config"] != self.config.model.to_dict():
            raise ValueError(
                f"{self.output / CHECKPOINT_NAME} belongs to another network; choose another run.output, or remove it"
            )
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _log(self, line: dict[str, Any]) -> None:
        with open(self.output / LOG_NAME, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
