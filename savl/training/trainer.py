"""The training loop."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from savl.degradation import Degradation
from savl.network import SAVL
from savl.ops import use_fused_kernels
from savl.training.adversarial import Adversary
from savl.training.checkpoint import (
    check_settings,
    identity_settings,
    initial_network,
    load_checkpoint,
    save_checkpoint,
)
from savl.training.config import TrainingConfig
from savl.training.cuda_graphs import graphed_reconstruct
from savl.training.data import Batch, PairPool, Prefetcher
from savl.training.monitoring import RunLog, Validation
from savl.training.objectives import Objective, Outcome
from savl.training.optimizer import AveragedWeights, build_optimizer
from savl.training.paired_patches import PairedPatches
from savl.training.patches import PatchSource
from savl.training.processes import any_process, join_processes, mean_losses, mean_number, of_every_process
from savl.training.schedule import TrainingTime, learning_rate_factor
from savl.training.step import CompletedStep, PendingStep
from savl.weights import save

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT_NAME = "checkpoint.pt"
WEIGHTS_NAME = "model.safetensors"
NOT_FINITE_NAME = "not_finite{}.pt"


class Trainer:
    """Train one network by one configuration, from the beginning or from the checkpoint in the folder of the run.

    One process on a CPU or GPU, or several under ``torchrun``, each with its own batches. Batches and samples depend on
    seed, rank and step alone, so that a run that was stopped and resumed gives the results of an uninterrupted one: bit
    for bit on a CPU with the same number of threads, if images are degraded either by this process or by workers all
    along; on a GPU as far as its operations are deterministic. A run with ``run.minutes`` is not reproducible, because
    its learning rate follows the clock.
    """

    def __init__(
        self,
        config: TrainingConfig,
        source: Callable[[int], Batch] | None = None,
        on_image: Callable[[int, int], None] | None = None,
    ) -> None:
        """Build everything and load the checkpoint if there is one.

        Args:
            config: Settings of the run.
            source: Returns the batch of a step; by default a `PairPool` of the images in ``config.data.hr`` and the
                pairs in ``config.pairs``.
            on_image: Called with (images decoded, images in total) while the images are decoded.

        Raises:
            TrainingUnavailable: accelerate is not installed.
            DegradationUnavailable: kornia is not installed.
            PerceptualUnavailable: The perceptual loss is used, and torchvision or its weights are missing.
            ValueError: The images cannot be used, the initial weights belong to another network, or the checkpoint is
                damaged or belongs to another run.
            ImageFileError: An image cannot be read.
            OSError: ``config.data.cache`` cannot be written or read.
            RuntimeError: A script that uses ``config.data.workers`` trains when it is imported.
        """
        if config.data.workers and getattr(multiprocessing.current_process(), "_inheriting", False):
            raise RuntimeError(
                "data.workers: the processes that degrade images import the main script again; it must start training "
                'under `if __name__ == "__main__":`'
            )
        self.config = config
        self.output = Path(config.run.output)
        self.accelerator = join_processes(config.run.device == "cpu")
        self.device = self.accelerator.device
        self.main = self.accelerator.is_main_process
        torch.manual_seed(config.run.seed)
        resumed = (self.output / CHECKPOINT_NAME).exists()
        # A checkpoint has all weights, so the initial ones may be gone.
        self.model = (SAVL(config.model) if resumed else initial_network(config)).to(self.device).train()
        if config.run.fused:
            use_fused_kernels(model=self.model)
        objective = Objective(self.model, config.objective).to(self.device).train()
        self.unwrapped_objective = objective
        """The objective without the wrapper of accelerate, whose weights have the names of a single process."""
        self.average = AveragedWeights(self.model, config.optimizer.ema)
        self.parameters: list[nn.Parameter] = [p for p in objective.parameters() if p.requires_grad]
        self.deferred_checks = _can_defer_checks(config, self.accelerator)
        """Whether a step is checked after the passes of the next one were enqueued, so that a GPU does not idle."""
        self.unwrapped_optimizer = build_optimizer(objective, config.optimizer, fused=self.deferred_checks)
        """The optimizer without the wrapper of accelerate; with deferred checks it has ``found_inf``."""
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
                example = torch.rand(config.data.batch, 3, side, side, device=self.device)
                self.model.reconstruct = graphed_reconstruct(self.model, example)  # type: ignore[method-assign, assignment]
        self.objective, self.optimizer = self.accelerator.prepare(objective, self.unwrapped_optimizer)
        self.adversary = Adversary(config.gan, config.optimizer, self.accelerator, config.model.scale)
        self.step = 0
        self.too_small = 0
        """Number of images or real pairs that are skipped because they are smaller than a patch."""
        self.excluded_results = 0
        """Number of images or real pairs that are skipped because savl has made them."""
        self.unsuitable_pairs: list[str] = []
        """Name of each real pair that is skipped because its images do not fit each other, with the reason."""
        self.time = TrainingTime(config.run.minutes, partial(mean_number, self.accelerator))
        self._stopping = False
        self._pending: PendingStep | None = None
        """The last step, until it is checked."""
        self._completed: list[CompletedStep] = []
        """Steps that were checked and have not been reported."""
        if resumed:
            self._resume(load_checkpoint(self.output / CHECKPOINT_NAME))
        self._check_equal_steps()
        self.validation = self._validation()
        self.source = source or self._pool(on_image)

    def train(self, on_step: Callable[[int, dict[str, float]], None] | None = None) -> Path | None:
        """Train to the end of the run, or until `stop`.

        Args:
            on_step: Called with (steps done, losses) for each step, in order; on a GPU often while the next step runs.

        Returns:
            Path of the exported averaged weights (savl safetensors); None if the run was stopped before its end.

        Raises:
            FloatingPointError: The loss or gradient of a step is not finite. Weights, average and checkpoint stay as
                they were before that step, and its batch is saved.
        """
        run = self.config.run
        self._stopping = False
        if self.main:
            self.output.mkdir(parents=True, exist_ok=True)
        run_log = RunLog(self.output, self.step) if self.main else None
        since, logged = monotonic(), self.step

        def log(completed: list[CompletedStep]) -> list[CompletedStep]:
            """Log steps; the losses of a logged step become the mean over all processes."""
            nonlocal since, logged
            for index, (number, lr_factor, losses) in enumerate(completed):
                if number % run.log_every and not (number == self.step and self._over):
                    continue
                completed[index] = CompletedStep(number, lr_factor, mean_losses(self.accelerator, losses))
                if run_log is not None:
                    speed = (number - logged) / max(monotonic() - since, 1e-9)
                    rate = lr_factor * self.config.optimizer.learning_rate
                    run_log.scalars(number, {"steps_per_second": speed, "lr": rate, **completed[index].losses})
                since, logged = monotonic(), number
            return completed

        def report(completed: list[CompletedStep]) -> None:
            for number, _, losses in completed:
                if on_step is not None:
                    on_step(number, losses)

        with (
            contextlib.closing(self.source) if isinstance(self.source, PairPool) else contextlib.nullcontext(),
            contextlib.closing(run_log) if run_log is not None else contextlib.nullcontext(),
            Prefetcher(self.source, self.device) as batches,
        ):
            if not self._over:
                batches.start(self.step)
            self.time.begin()
            try:
                while not self._over and not any_process(self.accelerator, self._stopping):
                    batch = self._next_batch(batches)
                    batches.start(self.step + 1)
                    factor = learning_rate_factor(self.config.optimizer, self.step, self.expected_steps)
                    outcome = self._step(batch, factor)
                    self.time.step_done()
                    last = self._over
                    shows = self.step % run.images_every == 0 or last
                    validates = self.validation is not None and (self.step % self.config.validation.every == 0 or last)
                    saves = self.step % run.checkpoint_every == 0 or last
                    if self.deferred_checks:
                        report(log(self._take_completed()))  # the step before this one
                    if shows or validates or saves:
                        self._check_pending()
                    completed = log(self._take_completed())
                    if run_log is not None and shows:
                        run_log.images(self.step, batch.y, outcome.sr, batch.x, outcome.severity)
                    if self.validation is not None and validates:
                        if run_log is not None:
                            run_log.scalars(self.step, self.validation(self._averaged()), "validation/")
                        since, logged = monotonic(), self.step
                    if saves:
                        self.checkpoint()
                    report(completed)
            finally:
                self._check_pending()
                completed = self._take_completed()
                if self.accelerator.num_processes == 1:  # several would wait for a process that has failed
                    completed = log(completed)
            report(completed)
        if not self._over:
            self.checkpoint()
            return None
        return self.export()

    @property
    def expected_steps(self) -> int:
        """Expected length of the run: ``run.steps``, or fewer if ``run.minutes`` will end it."""
        return self.time.expected_steps(self.step, self.config.run.steps)

    @property
    def _over(self) -> bool:
        return self.step >= self.config.run.steps or self.time.limit_reached

    def _next_batch(self, batches: Prefetcher) -> Batch:
        """Return the next batch; if it cannot be made (for example out of memory), save the steps done so far."""
        try:
            return batches.take()
        except Exception:
            if self.step > 0 and self.accelerator.num_processes == 1:  # several would wait for each other
                self.checkpoint()
            raise

    def stop(self) -> None:
        """Make `train` complete the current step, write a checkpoint and return. Safe to call from a signal handler."""
        self._stopping = True

    def checkpoint(self) -> None:
        """Write the state of the run atomically; the first process writes and the others wait.

        Raises:
            FloatingPointError: The last step was not finite, and nothing is written.
        """
        self._check_pending()
        if self.main:
            state: dict[str, Any] = {
                "step": self.step,
                "time": self.time.state_dict(),
                "settings": identity_settings(self.config, self.accelerator.num_processes),
                "average": self.average.state_dict(),
                "objective": self.unwrapped_objective.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "adversary": self.adversary.state_dict(),
            }
            save_checkpoint(self.output / CHECKPOINT_NAME, state)
        self.accelerator.wait_for_everyone()

    def export(self) -> Path:
        """Write the averaged weights to a file that `savl.load` reads.

        Raises:
            FloatingPointError: The last step was not finite, and nothing is written.
        """
        self._check_pending()
        path = self.output / WEIGHTS_NAME
        if self.main:
            averaged = SAVL(self.config.model)
            averaged.load_state_dict(self._averaged().state_dict())
            save(averaged, path)
        self.accelerator.wait_for_everyone()
        return path

    def _step(self, batch: Batch, lr_factor: float) -> Outcome:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.optimizer.learning_rate * lr_factor
        # One seed per process and step, for the sample of the posterior and for stochastic depth, which uses torch's
        # global generator.
        seed = (self.config.run.seed << 32) + (self.accelerator.process_index << 24) + self.step
        torch.manual_seed(seed)
        with self.autocast:
            outcome: Outcome = self.objective(batch, seed, self.step)
            more, terms = self.adversary.generator_losses(outcome.sr, batch.x, self.step)
        total = outcome.losses.total + more
        losses = outcome.losses.terms() | {name: term.detach() for name, term in terms.items()}
        step = PendingStep(self.step, seed, lr_factor, batch, losses | {"total": total.detach()})
        self._require_finite_number(step, "the loss", total)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(total)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.optimizer.clip)
        assert norm is not None
        self._require_finite_number(step, "the gradient", norm)
        with self.autocast:
            discriminator_losses = self.adversary.discriminator_losses(outcome.sr, batch.x)
        for name, loss in discriminator_losses.items():
            step.losses[name] = loss.detach()
            self._require_finite_number(step, f"the {name}'s loss", loss)
            self._require(self.adversary.backward(loss), step, f"the {name}'s gradient")
            self.adversary.step(lr_factor)
        if self.deferred_checks:
            step.send()
            self.unwrapped_optimizer.found_inf = step.found_inf()  # type: ignore[union-attr]
            # Before the optimizer's step, while weights and average contain checked steps only.
            self._check_pending()
        self.optimizer.step()
        self._pending = step
        self.step += 1
        if not self.deferred_checks:
            self._check_pending()
        return outcome

    def _require_finite_number(self, step: PendingStep, name: str, value: Tensor) -> None:
        """Check a number before it can reach the weights: now, or with deferred checks by the optimizer on the GPU."""
        if self.deferred_checks:
            step.checked[name] = value.detach()
        else:
            self._require(bool(torch.isfinite(value)), step, name)

    def _check_pending(self) -> None:
        """Check the last step if that was not done: it is refused, or it becomes part of the average."""
        step, self._pending = self._pending, None
        if step is None:
            return
        losses, not_finite = step.read()
        if not_finite is not None:
            self._refuse(step, not_finite)
        self.average.update_parameters(self.model)
        self._completed.append(CompletedStep(step.index + 1, step.lr_factor, losses))

    def _take_completed(self) -> list[CompletedStep]:
        completed, self._completed = self._completed, []
        return completed

    def _require(self, finite: bool, step: PendingStep, name: str) -> None:
        """Stop all processes before a number reaches the weights that is not finite in one of them."""
        if any_process(self.accelerator, not finite):
            self._refuse(step, f"{name} of another process" if finite else name)

    def _refuse(self, step: PendingStep, name: str) -> NoReturn:
        """Stop at a step that has changed no weight, and save what is needed to reproduce it."""
        self.step = step.index
        losses, _ = step.read()
        rank = f"_{self.accelerator.process_index}" if self.accelerator.num_processes > 1 else ""
        path = self.output / NOT_FINITE_NAME.format(rank)
        self.output.mkdir(parents=True, exist_ok=True)
        batch = vars(step.batch.to(torch.device("cpu")))
        state = {"step": step.index, "seed": step.seed, "losses": losses, **batch, "weights": self._weights()}
        save_checkpoint(path, state)
        raise FloatingPointError(
            f"step {step.index}: {name} is not finite, at losses of {losses}; batch and weights are in {path}; lower "
            f"optimizer.learning_rate, or check the data"
        )

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in self.unwrapped_objective.state_dict().items()}

    def _averaged(self) -> SAVL:
        module = self.average.module
        assert isinstance(module, SAVL)
        return module

    def _pool(self, on_image: Callable[[int, int], None] | None) -> PairPool:
        data, settings, scale = self.config.data, self.config.pairs, self.config.model.scale
        degradation = Degradation(self.config.degradation, scale)  # before minutes of decoding: it may be unavailable
        patches, pairs = None, None
        with contextlib.ExitStack() as first:
            if data.cache:  # one process writes it, or one per machine if machines do not share it
                first.enter_context(self.accelerator.main_process_first())
                first.enter_context(self.accelerator.local_main_process_first())
            if settings.lr:
                pairs = PairedPatches(settings, data.patch, scale, on_image, data.cache, data.include_results)
            if pairs is None or settings.share < 1:
                side = (data.patch + 2 * data.margin) * scale
                patches = PatchSource(data.hr, side, on_image, data.cache, data.include_results)
        sources = [source for source in (patches, pairs) if source is not None]
        self.too_small = sum(source.too_small for source in sources)
        self.excluded_results = sum(source.excluded_results for source in sources)
        self.unsuitable_pairs = [] if pairs is None else pairs.unsuitable
        rank = self.accelerator.process_index
        return PairPool(
            patches, degradation, data, seed=self.config.run.seed, rank=rank, device=self.device, pairs=pairs
        )

    def _validation(self) -> Validation | None:
        settings = self.config.validation
        if not settings.hr or not self.main:
            return None
        return Validation(settings, Degradation(self.config.degradation, self.config.model.scale), self.config.run.seed)

    def _check_equal_steps(self) -> None:
        """Check that all processes resume at the same step; other machines may not see the folder of the run."""
        steps = of_every_process(self.accelerator, self.step)
        if len(set(steps)) > 1:
            raise ValueError(
                f"run.output: {self.output} holds different checkpoints for different processes (steps done: "
                f"{steps}); it must be a folder that all of them share"
            )

    def _resume(self, state: dict[str, Any]) -> None:
        path = self.output / CHECKPOINT_NAME
        try:
            check_settings(path, state["settings"], identity_settings(self.config, self.accelerator.num_processes))
            if self.config.run.steps < state["step"]:
                raise ValueError(
                    f"run.steps must be at least {state['step']}, the steps {path} has done already, "
                    f"got {self.config.run.steps}"
                )
            self.step = state["step"]
            self.unwrapped_objective.load_state_dict(state["objective"])
            self.average.load_state_dict(state["average"])
            if "time" in state:  # not in a checkpoint of an older version
                self.time.load_state_dict(state["time"])
            for group in state["optimizer"]["param_groups"]:
                group["fused"] = self.unwrapped_optimizer.defaults["fused"]  # depends on the device of this run
            self.optimizer.load_state_dict(state["optimizer"])
            self.adversary.load_state_dict(state["adversary"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be resumed from: {error}") from error


def _can_defer_checks(config: TrainingConfig, accelerator: Accelerator) -> bool:
    """Return whether checks may be deferred: on a GPU, with one process, which need not agree, and one optimizer."""
    return accelerator.device.type == "cuda" and accelerator.num_processes == 1 and config.gan.weight == 0
