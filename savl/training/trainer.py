"""The training loop."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from savl.degradation import Degradation
from savl.network import SAVL
from savl.ops import use_fused_kernels
from savl.training.adversary import Adversary
from savl.training.checkpoint import load_checkpoint, save_checkpoint
from savl.training.config import TrainingConfig
from savl.training.data import Batch, PairPool, PatchSource
from savl.training.graphed import graphed_reconstruct
from savl.training.objectives import Objective, Outcome
from savl.training.records import Records
from savl.training.schedule import learning_rate
from savl.training.start import initial_network
from savl.training.validation import Validation
from savl.weights import save

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT_NAME = "checkpoint.pt"
WEIGHTS_NAME = "model.safetensors"
REFUSED_NAME = "not_finite{}.pt"


class TrainingUnavailable(RuntimeError):
    """A package that training needs is not installed; the message says how to get it."""


class Trainer:
    """Train one network by one configuration, from scratch or from the run folder's checkpoint.

    One process on a CPU or GPU, or several under ``torchrun``, each with batches of its own. Batches and samples follow
    from seed, rank and step, so stopping and resuming gives the numbers of a run that never stopped: on a CPU with as
    many threads, and images degraded by this process or by others all along, to the bit; on a GPU as far as its own
    operations repeat themselves.
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
            source: Gives the batch of a step; by default a `PairPool` over ``config.data.hr``.
            on_image: Told (decoded so far, total) while the images are decoded.

        Raises:
            TrainingUnavailable: accelerate is not installed.
            DegradationUnavailable: kornia is not installed.
            PerceptualUnavailable: A perceptual loss is asked for and torchvision or its weights are missing.
            ValueError: The data cannot serve, the weights to start from are of another network, or the checkpoint is
                damaged or belongs to another run.
            ImageFileError: An image cannot be read.
            OSError: ``config.data.cache`` cannot be written or read.
            RuntimeError: A script trains with ``config.data.workers``, and not only where it is the main program.
        """
        if config.data.workers and getattr(multiprocessing.current_process(), "_inheriting", False):
            raise RuntimeError(
                "data.workers: the processes that degrade images import the script anew that trains; it must do so "
                'under `if __name__ == "__main__":` alone'
            )
        self.config = config
        self.output = Path(config.run.output)
        self.accelerator = _accelerator(config.run.device == "cpu")
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        torch.manual_seed(config.run.seed)
        resumed = (self.output / CHECKPOINT_NAME).exists()
        # What a run started from is not needed, and may be gone, where a checkpoint has all weights.
        self.model = (SAVL(config.model) if resumed else initial_network(config)).to(self.device).train()
        if config.run.fused:
            use_fused_kernels(model=self.model)
        objective = Objective(self.model, config.objective).to(self.device).train()
        self.plain = objective
        """The objective without what `accelerate` wraps around it: the weights, by the names of a single process."""
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(config.optimizer.ema))
        self.parameters: list[nn.Parameter] = [p for p in objective.parameters() if p.requires_grad]
        adam = torch.optim.Adam(self.parameters, lr=config.optimizer.learning_rate, betas=config.optimizer.betas)
        self.autocast = torch.autocast(
            self.device.type, torch.bfloat16, enabled=config.run.bfloat16, cache_enabled=not config.run.graph
        )
        if config.run.compile:
            self.model.reconstruct = torch.compile(self.model.reconstruct)  # type: ignore[method-assign]
        if config.run.graph and self.device.type == "cuda" and not config.objective.freeze_network:
            if self.accelerator.num_processes > 1:
                raise ValueError("run.graph: the passes of several processes cannot be recorded; set it to false")
            side = config.data.patch
            with self.autocast:
                like = torch.rand(config.data.batch, 3, side, side, device=self.device)
                self.model.reconstruct = graphed_reconstruct(self.model, like)  # type: ignore[method-assign, assignment]
        self.objective, self.optimizer = self.accelerator.prepare(objective, adam)
        self.adversary = Adversary(config.gan, config.optimizer, self.accelerator)
        self.step = 0
        self.left_out = 0
        """Images that are too small to be learned from."""
        self._stopping = False
        if resumed:
            self._resume(load_checkpoint(self.output / CHECKPOINT_NAME))
        self._check_steps()
        self.validation = self._validation()
        self.source = source or self._pool(on_image)

    def train(self, on_step: Callable[[int, dict[str, float]], None] | None = None) -> Path | None:
        """Run to the end, or until `stop`.

        Args:
            on_step: Told (steps done, losses) after each step.

        Returns:
            Path of the exported averaged weights (savl safetensors); None if the run was stopped before its end.

        Raises:
            FloatingPointError: Loss or gradient is not finite; weights and checkpoint stay as they were, and the batch
                is saved.
        """
        run = self.config.run
        self._stopping = False
        if self.main:
            self.output.mkdir(parents=True, exist_ok=True)
        records = Records(self.output, self.step) if self.main else None
        started, logged = monotonic(), self.step
        with (
            contextlib.closing(self.source) if isinstance(self.source, PairPool) else contextlib.nullcontext(),
            contextlib.closing(records) if records is not None else contextlib.nullcontext(),
            # The next batch is prepared while this one is learned from.
            ThreadPoolExecutor(max_workers=1) as ahead,
        ):
            upcoming = ahead.submit(self.source, self.step)
            while self.step < run.steps and not self._all_stop():
                batch = self._made(upcoming)
                upcoming = ahead.submit(self.source, self.step + 1)
                rate = learning_rate(self.config.optimizer, self.step, run.steps)
                losses, outcome = self._step(batch.to(self.device), rate)
                self.step += 1
                last = self.step == run.steps
                if self.step % run.log_every == 0 or last:
                    losses = self._mean(losses)
                    if records is not None:
                        speed = (self.step - logged) / max(monotonic() - started, 1e-9)
                        peak = self.config.optimizer.learning_rate
                        records.scalars(self.step, {"steps_per_second": speed, "lr": rate * peak, **losses})
                    started, logged = monotonic(), self.step
                if records is not None and (self.step % run.images_every == 0 or last):
                    records.images(self.step, batch.y, outcome.sr, batch.x, outcome.severity)
                if self.validation is not None and (self.step % self.config.validation.every == 0 or last):
                    if records is not None:
                        records.scalars(self.step, self.validation(self._averaged()), "validation/")
                    started, logged = monotonic(), self.step
                if self.step % run.checkpoint_every == 0 or last:
                    self.checkpoint()
                if on_step is not None:
                    on_step(self.step, losses)
        if self.step < run.steps:
            self.checkpoint()
            return None
        return self.export()

    def _made(self, upcoming: Future[Batch]) -> Batch:
        """The next batch. Where it cannot be made, a process being out of memory, say, no step is lost with it."""
        try:
            return upcoming.result()
        except Exception:
            if self.step > 0 and self.accelerator.num_processes == 1:  # several would wait for each other
                self.checkpoint()
            raise

    def stop(self) -> None:
        """Ask `train` to finish the step in hand, write a checkpoint and return. Safe to call from a signal handler."""
        self._stopping = True

    def checkpoint(self) -> None:
        """Write the state of the run, atomically; the first process does it, the others wait."""
        if self.main:
            state: dict[str, Any] = {
                "step": self.step,
                "settings": _settings_that_count(self.config, self.accelerator.num_processes),
                "average": self.average.state_dict(),
                "objective": self.plain.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "adversary": self.adversary.state_dict(),
            }
            save_checkpoint(self.output / CHECKPOINT_NAME, state)
        self.accelerator.wait_for_everyone()

    def export(self) -> Path:
        """Write the averaged weights as a file that `savl.load` reads."""
        path = self.output / WEIGHTS_NAME
        if self.main:
            averaged = SAVL(self.config.model)
            averaged.load_state_dict(self._averaged().state_dict())
            save(averaged, path)
        self.accelerator.wait_for_everyone()
        return path

    def _step(self, batch: Batch, rate: float) -> tuple[dict[str, float], Outcome]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.learning_rate * rate
        # A seed of its own per process and step: for the posterior's sample, and for stochastic depth, which draws from
        # torch.
        seed = (self.config.run.seed << 32) + (self.accelerator.process_index << 24) + self.step
        torch.manual_seed(seed)
        with self.autocast:
            outcome: Outcome = self.objective(batch, seed, self.step)
            more, terms = self.adversary.against(outcome.sr, batch.x)
        total = outcome.losses.total + more
        log = outcome.losses.to_log() | {name: float(value.detach()) for name, value in terms.items()}
        log["total"] = float(total.detach())
        self._all_finite(bool(torch.isfinite(total)), batch, seed, "the loss", log)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(total)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.optimizer.clip)
        assert norm is not None
        self._all_finite(bool(torch.isfinite(norm)), batch, seed, "the gradient", log)
        with self.autocast:
            judged = self.adversary.judge(outcome.sr, batch.x)
        for name, loss in judged.items():
            log[name] = float(loss.detach())
            self._all_finite(bool(torch.isfinite(loss)), batch, seed, f"the {name}'s loss", log)
            self._all_finite(self.adversary.gradient(loss), batch, seed, f"the {name}'s gradient", log)
            self.adversary.learn(rate)
        self.optimizer.step()
        self.average.update_parameters(self.model)
        return log, outcome

    def _all_finite(self, finite: bool, batch: Batch, seed: int, what: str, log: dict[str, float]) -> None:
        """Stop before anything reaches the weights where a process met what is not finite; all of them stop together.

        Each leaves what it takes to see why.
        """
        if self.accelerator.num_processes > 1:
            met = self.accelerator.reduce(torch.tensor(float(not finite), device=self.device), "sum")
            assert isinstance(met, Tensor)
            here = not finite
            finite = not bool(met > 0)
            what = what if here or finite else f"{what} of another process"
        if finite:
            return
        rank = f"_{self.accelerator.process_index}" if self.accelerator.num_processes > 1 else ""
        path = self.output / REFUSED_NAME.format(rank)
        self.output.mkdir(parents=True, exist_ok=True)
        whole = batch.to(torch.device("cpu"))
        images = {"y": whole.y, "x": whole.x, "z": whole.z, "severity": whole.severity, "alike": whole.alike}
        save_checkpoint(path, {"step": self.step, "seed": seed, "losses": log, **images, "weights": self._weights()})
        raise FloatingPointError(
            f"step {self.step}: {what} is not finite, at losses of {log}; batch and weights are in {path}; lower "
            f"optimizer.learning_rate, or check the data"
        )

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in self.plain.state_dict().items()}

    def _averaged(self) -> SAVL:
        module = self.average.module
        assert isinstance(module, SAVL)
        return module

    def _mean(self, losses: dict[str, float]) -> dict[str, float]:
        """Over all processes."""
        if self.accelerator.num_processes == 1:
            return losses
        values = torch.tensor(list(losses.values()), device=self.device)
        means = self.accelerator.reduce(values, "mean")
        assert isinstance(means, Tensor)
        return dict(zip(losses, means.tolist(), strict=True))

    def _all_stop(self) -> bool:
        """Whether any process was asked to stop; all of them end after the same step."""
        if self.accelerator.num_processes == 1:
            return self._stopping
        asked = self.accelerator.reduce(torch.tensor(float(self._stopping), device=self.device), "sum")
        assert isinstance(asked, Tensor)
        return bool(asked > 0)

    def _pool(self, on_image: Callable[[int, int], None] | None) -> PairPool:
        data, scale = self.config.data, self.config.model.scale
        degradation = Degradation(self.config.degradation, scale)  # before minutes of decoding: it may be unavailable
        with contextlib.ExitStack() as first:
            if data.cache:  # one process fills it, and one of each machine where each has its own; the others find it
                first.enter_context(self.accelerator.main_process_first())
                first.enter_context(self.accelerator.local_main_process_first())
            patches = PatchSource(data.hr, (data.patch + 2 * data.margin) * scale, on_image, data.cache)
        self.left_out = patches.left_out
        rank = self.accelerator.process_index
        return PairPool(patches, degradation, data, seed=self.config.run.seed, rank=rank, device=self.device)

    def _validation(self) -> Validation | None:
        settings = self.config.validation
        if not settings.hr or not self.main:
            return None
        return Validation(settings, Degradation(self.config.degradation, self.config.model.scale), self.config.run.seed)

    def _check_steps(self) -> None:
        """Whether all processes stand at the same step: those of other machines may not see the run's folder."""
        steps = self.accelerator.gather(torch.tensor([self.step], device=self.device))
        assert isinstance(steps, Tensor)
        if bool((steps != self.step).any()):
            raise ValueError(
                f"run.output: {self.output} holds another state for some processes than for others (steps done: "
                f"{steps.tolist()}); it must be a folder that all of them share"
            )

    def _resume(self, state: dict[str, Any]) -> None:
        path = self.output / CHECKPOINT_NAME
        try:
            then, now = state["settings"], _settings_that_count(self.config, self.accelerator.num_processes)
            # What a checkpoint of an older version does not speak of was as it is by default now.
            then = {**_settings_that_count(TrainingConfig(), 1), **then}
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
            self.plain.load_state_dict(state["objective"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.adversary.load_state_dict(state["adversary"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be resumed from: {error}") from error


def _accelerator(cpu: bool) -> Accelerator:
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError as error:
        raise TrainingUnavailable(
            f"training needs accelerate, which cannot be imported ({error}); pip install 'savl[train]' brings it"
        ) from error
    # Precision is this package's own business: accelerate would keep the first choice for the whole process. And
    # processes wait for the first one while it validates.
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=2))
    return Accelerator(cpu=cpu, mixed_precision="no", kwargs_handlers=[patient])


def _settings_that_count(config: TrainingConfig, processes: int) -> dict[str, Any]:
    """What a resumed run must share with the one it resumes: all but its length, its rhythm and where files lie."""
    free = {"run.steps", "run.log_every", "run.checkpoint_every", "run.images_every", "run.output", "run.device"}
    free |= {"run.fused", "run.compile", "run.graph", "data.hr", "data.cache", "data.workers"}
    flat = {name: value for name, value in _flat(config.to_dict()) if not name.startswith("validation.")}
    return {"processes": processes, **{name: value for name, value in flat.items() if name not in free}}


def _flat(tables: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    return [
        pair
        for name, value in tables.items()
        for pair in (_flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)])
    ]
