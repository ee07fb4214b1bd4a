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
from savl.training.adversary import Adversary
from savl.training.ahead import Ahead
from savl.training.averaged_weights import AveragedWeights
from savl.training.checkpoint import check_settings, load_checkpoint, save_checkpoint, settings_that_count
from savl.training.config import TrainingConfig
from savl.training.data import Batch, PairPool, PatchSource
from savl.training.finite import Looked, Step
from savl.training.graphed import graphed_reconstruct
from savl.training.objectives import Objective, Outcome
from savl.training.optimizer import build_optimizer
from savl.training.processes import any_process, join_processes, mean_losses, mean_number, of_every_process
from savl.training.records import Records
from savl.training.schedule import learning_rate
from savl.training.start import initial_network
from savl.training.training_time import TrainingTime
from savl.training.validation import Validation
from savl.weights import save

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT_NAME = "checkpoint.pt"
WEIGHTS_NAME = "model.safetensors"
REFUSED_NAME = "not_finite{}.pt"


class Trainer:
    """Train one network by one configuration, from scratch or from the run folder's checkpoint.

    One process on a CPU or GPU, or several under ``torchrun``, each with batches of its own. Batches and samples follow
    from seed, rank and step, so stopping and resuming gives the numbers of a run that never stopped: on a CPU with as
    many threads, and images degraded by this process or by others all along, to the bit; on a GPU as far as its own
    operations repeat themselves. Not with ``run.minutes``: its learning rates follow the clock.
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
        self.accelerator = join_processes(config.run.device == "cpu")
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
        self.average = AveragedWeights(self.model, config.optimizer.ema)
        self.parameters: list[nn.Parameter] = [p for p in objective.parameters() if p.requires_grad]
        self.late = _looks_late(config, self.accelerator)
        """Whether a step is looked at after the next one's passes were enqueued, so that a GPU has no time to idle."""
        self.bare_optimizer = build_optimizer(objective, config.optimizer, fused=self.late)
        """Without the wrapping of `accelerate`; where steps are looked at late it can be told to change nothing."""
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
        self.objective, self.optimizer = self.accelerator.prepare(objective, self.bare_optimizer)
        self.adversary = Adversary(config.gan, config.optimizer, self.accelerator)
        self.step = 0
        self.left_out = 0
        """Images that are too small to be learned from."""
        self.time = TrainingTime(config.run.minutes, partial(mean_number, self.accelerator))
        self._stopping = False
        self._unseen: Step | None = None
        """The last step, until it is looked at."""
        self._looked: list[Looked] = []
        """Steps that `train` has not told of yet."""
        if resumed:
            self._resume(load_checkpoint(self.output / CHECKPOINT_NAME))
        self._check_steps()
        self.validation = self._validation()
        self.source = source or self._pool(on_image)

    def train(self, on_step: Callable[[int, dict[str, float]], None] | None = None) -> Path | None:
        """Run to the end, or until `stop`.

        Args:
            on_step: Told (steps done, losses) of each step, in order; on a GPU often while the next step is under way.

        Returns:
            Path of the exported averaged weights (savl safetensors); None if the run was stopped before its end.

        Raises:
            FloatingPointError: Loss or gradient is not finite; weights, their average and the checkpoint stay as they
                were before that step, and the batch is saved.
        """
        run = self.config.run
        self._stopping = False
        if self.main:
            self.output.mkdir(parents=True, exist_ok=True)
        records = Records(self.output, self.step) if self.main else None
        started, logged = monotonic(), self.step

        def log(looked: list[Looked]) -> list[Looked]:
            """Those that are to be logged become the mean over all processes."""
            nonlocal started, logged
            for index, (done, rate, losses) in enumerate(looked):
                if done % run.log_every and not (done == self.step and self._over):
                    continue
                looked[index] = Looked(done, rate, mean_losses(self.accelerator, losses))
                if records is not None:
                    speed = (done - logged) / max(monotonic() - started, 1e-9)
                    peak = self.config.optimizer.learning_rate
                    values = {"steps_per_second": speed, "lr": rate * peak, **looked[index].losses}
                    records.scalars(done, values)
                started, logged = monotonic(), done
            return looked

        def tell(looked: list[Looked]) -> None:
            for done, _, losses in looked:
                if on_step is not None:
                    on_step(done, losses)

        with (
            contextlib.closing(self.source) if isinstance(self.source, PairPool) else contextlib.nullcontext(),
            contextlib.closing(records) if records is not None else contextlib.nullcontext(),
            Ahead(self.source, self.device) as batches,
        ):
            if not self._over:
                batches.begin(self.step)
            self.time.begin()
            try:
                while not self._over and not any_process(self.accelerator, self._stopping):
                    batch = self._made(batches)
                    batches.begin(self.step + 1)
                    outcome = self._step(batch, learning_rate(self.config.optimizer, self.step, self.expected_steps))
                    self.time.step_done()
                    last = self._over
                    shown = self.step % run.images_every == 0 or last
                    validated = self.validation is not None and (self.step % self.config.validation.every == 0 or last)
                    saved = self.step % run.checkpoint_every == 0 or last
                    if self.late:
                        tell(log(self._newly_looked()))  # of the step before this one
                    if shown or validated or saved:
                        self._look()
                    looked = log(self._newly_looked())
                    if records is not None and shown:
                        records.images(self.step, batch.y, outcome.sr, batch.x, outcome.severity)
                    if self.validation is not None and validated:
                        if records is not None:
                            records.scalars(self.step, self.validation(self._averaged()), "validation/")
                        started, logged = monotonic(), self.step
                    if saved:
                        self.checkpoint()
                    tell(looked)
            finally:
                self._look()
                rest = self._newly_looked()
                if self.accelerator.num_processes == 1:  # several would wait for each other, however this one ends
                    rest = log(rest)
            tell(rest)
        if not self._over:
            self.checkpoint()
            return None
        return self.export()

    @property
    def expected_steps(self) -> int:
        """Length of the run, as far as is known: ``run.steps``, or fewer where ``run.minutes`` will end it."""
        return self.time.expected_steps(self.step, self.config.run.steps)

    @property
    def _over(self) -> bool:
        return self.step >= self.config.run.steps or self.time.over

    def _made(self, batches: Ahead) -> Batch:
        """The next batch. Where it cannot be made, a process being out of memory, say, no step is lost with it."""
        try:
            return batches.take()
        except Exception:
            if self.step > 0 and self.accelerator.num_processes == 1:  # several would wait for each other
                self.checkpoint()
            raise

    def stop(self) -> None:
        """Ask `train` to finish the step in hand, write a checkpoint and return. Safe to call from a signal handler."""
        self._stopping = True

    def checkpoint(self) -> None:
        """Write the state of the run, atomically; the first process does it, the others wait.

        Raises:
            FloatingPointError: The last step was not finite, and nothing is written.
        """
        self._look()
        if self.main:
            state: dict[str, Any] = {
                "step": self.step,
                "time": self.time.state_dict(),
                "settings": settings_that_count(self.config, self.accelerator.num_processes),
                "average": self.average.state_dict(),
                "objective": self.plain.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "adversary": self.adversary.state_dict(),
            }
            save_checkpoint(self.output / CHECKPOINT_NAME, state)
        self.accelerator.wait_for_everyone()

    def export(self) -> Path:
        """Write the averaged weights as a file that `savl.load` reads.

        Raises:
            FloatingPointError: The last step was not finite, and nothing is written.
        """
        self._look()
        path = self.output / WEIGHTS_NAME
        if self.main:
            averaged = SAVL(self.config.model)
            averaged.load_state_dict(self._averaged().state_dict())
            save(averaged, path)
        self.accelerator.wait_for_everyone()
        return path

    def _step(self, batch: Batch, rate: float) -> Outcome:
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
        losses = outcome.losses.terms() | {name: term.detach() for name, term in terms.items()}
        step = Step(self.step, seed, rate, batch, losses | {"total": total.detach()})
        self._check(step, "the loss", total)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(total)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.optimizer.clip)
        assert norm is not None
        self._check(step, "the gradient", norm)
        with self.autocast:
            judged = self.adversary.judge(outcome.sr, batch.x)
        for name, loss in judged.items():
            step.losses[name] = loss.detach()
            self._check(step, f"the {name}'s loss", loss)
            self._all_finite(self.adversary.gradient(loss), step, f"the {name}'s gradient")
            self.adversary.learn(rate)
        if self.late:
            step.send()
            self.bare_optimizer.found_inf = step.found_inf()  # type: ignore[union-attr]
            # Before the optimizer's step: weights and average are those of the steps that were looked at.
            self._look()
        self.optimizer.step()
        self._unseen = step
        self.step += 1
        if not self.late:
            self._look()
        return outcome

    def _check(self, step: Step, what: str, value: Tensor) -> None:
        """See to it that nothing reaches the weights where a number is not finite."""
        if self.late:
            step.checked[what] = value.detach()
        else:
            self._all_finite(bool(torch.isfinite(value)), step, what)

    def _look(self) -> None:
        """Look at the last step, unless that was done: it is refused, or becomes part of the average."""
        step, self._unseen = self._unseen, None
        if step is None:
            return
        losses, not_finite = step.read()
        if not_finite is not None:
            self._refuse(step, not_finite)
        self.average.update_parameters(self.model)
        self._looked.append(Looked(step.done + 1, step.rate, losses))

    def _newly_looked(self) -> list[Looked]:
        looked, self._looked = self._looked, []
        return looked

    def _all_finite(self, finite: bool, step: Step, what: str) -> None:
        """Stop before anything reaches the weights where a process met what is not finite; all of them stop together.

        Each leaves what it takes to see why.
        """
        if any_process(self.accelerator, not finite):
            self._refuse(step, f"{what} of another process" if finite else what)

    def _refuse(self, step: Step, what: str) -> NoReturn:
        """Stop at a step that changed no weight, and leave what it takes to see why."""
        self.step = step.done
        losses, _ = step.read()
        rank = f"_{self.accelerator.process_index}" if self.accelerator.num_processes > 1 else ""
        path = self.output / REFUSED_NAME.format(rank)
        self.output.mkdir(parents=True, exist_ok=True)
        whole = step.batch.to(torch.device("cpu"))
        state = {"step": step.done, "seed": step.seed, "losses": losses, **vars(whole), "weights": self._weights()}
        save_checkpoint(path, state)
        raise FloatingPointError(
            f"step {step.done}: {what} is not finite, at losses of {losses}; batch and weights are in {path}; lower "
            f"optimizer.learning_rate, or check the data"
        )

    def _weights(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in self.plain.state_dict().items()}

    def _averaged(self) -> SAVL:
        module = self.average.module
        assert isinstance(module, SAVL)
        return module

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
        steps = of_every_process(self.accelerator, self.step)
        if len(set(steps)) > 1:
            raise ValueError(
                f"run.output: {self.output} holds another state for some processes than for others (steps done: "
                f"{steps}); it must be a folder that all of them share"
            )

    def _resume(self, state: dict[str, Any]) -> None:
        path = self.output / CHECKPOINT_NAME
        try:
            check_settings(path, state["settings"], settings_that_count(self.config, self.accelerator.num_processes))
            if self.config.run.steps < state["step"]:
                raise ValueError(
                    f"run.steps must be at least {state['step']}, the steps {path} has done already, "
                    f"got {self.config.run.steps}"
                )
            self.step = state["step"]
            self.plain.load_state_dict(state["objective"])
            self.average.load_state_dict(state["average"])
            if "time" in state:  # not in a checkpoint of an older version
                self.time.load_state_dict(state["time"])
            for group in state["optimizer"]["param_groups"]:
                group["fused"] = self.bare_optimizer.defaults["fused"]  # as it must be here, where the run goes on
            self.optimizer.load_state_dict(state["optimizer"])
            self.adversary.load_state_dict(state["adversary"])
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"{path} cannot be resumed from: {error}") from error


def _looks_late(config: TrainingConfig, accelerator: Accelerator) -> bool:
    """Whether steps are looked at late: on a GPU, unless several processes must agree or two networks learn in turn."""
    return accelerator.device.type == "cuda" and accelerator.num_processes == 1 and config.gan.weight == 0
