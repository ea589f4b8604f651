"""The training loop, its methods in the order they run."""

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints.folder import BackgroundWriter, TrainingState
from keyreid.checkpoints.run_folder import RunFolder
from keyreid.checkpoints.same_data import data_about
from keyreid.checkpoints.start import start_network
from keyreid.checkpoints.weights_file import WeightsHeader
from keyreid.config import Config
from keyreid.distributed.preemption import StopRequest
from keyreid.distributed.ranks import Ranks
from keyreid.errors import CheckpointError, KeyreidError
from keyreid.losses import Criterion
from keyreid.model import KeyReID, build_model
from keyreid.model.sharded_classes import ClassGroup
from keyreid.shards import open_reader
from keyreid.shards.batch import ClipBatch
from keyreid.shards.plan import TrainingPlan
from keyreid.shards.shard_set import ShardSet
from keyreid.tracking import Tracker
from keyreid.training import OnEvaluation, snapshot, stochastic_depth
from keyreid.training.class_optimizer import ClassOptimizer
from keyreid.training.costs import described
from keyreid.training.engine import Engine, WeightAverage, count_parameters
from keyreid.training.engine_config import check_classes, check_precision
from keyreid.training.recipe import changes, recipe
from keyreid.training.reports import Meter, line, mfu_factor, profiled
from keyreid.training.schedule import build_optimizer, build_schedule
from keyreid.training.snapshot import Restored
from keyreid.training.step import Stepper, StepResult, TrainedModule

log = logging.getLogger(__name__)


class Interrupted(Exception):  # noqa: N818 - an ending in order, not an error
    """A stop signal ended training after its state was saved."""


class Trainer:
    """One run on this process's rank. Making it checks everything and writes nothing; so does no start that is refused.

    Args:
        tracker: who is told; silent on all ranks but the first.
        stop: asked after every step.
        resume: from the newest whole checkpoint of the run's folder, if there is one.
        on_evaluation: who hears of each evaluation, once its checkpoint is on disk, and may end the run there.
        allowed: settings and sections in which the checkpoint may be of another recipe (see recipe.py).

    Attributes:
        resumed: the checkpoint; None in a run that begins.
        changes: {setting: (before, now)}, of those allowed.
    """

    def __init__(
        self,
        config: Config,
        ranks: Ranks,
        tracker: Tracker,
        stop: StopRequest,
        resume: bool = True,
        on_evaluation: OnEvaluation | None = None,
        allowed: Sequence[str] = (),
    ) -> None:
        self.config, self.ranks, self.tracker = config, ranks, tracker
        self.stop, self.on_evaluation, self.allowed = stop, on_evaluation, allowed
        self._numbers: dict[str, float] = {}
        self._bad_in_a_row = 0
        self.root = RunFolder(config.run_dir).checkpoints
        self.judged = "holdout" if config.data.holdout else "test"  # by evaluations: who is held out, if anybody is
        check_precision(config.training, ranks.device)
        check_classes(config)

        from keyreid.evaluation.judging import check_judgeable  # tables and pictures: not while ranks start

        self.shards = ShardSet.from_config(config.data)
        check_judgeable(self.shards, config, self.judged)  # rather now than after the last epoch
        self.plan = TrainingPlan(self.shards, config.data, config.clip, config.seed)
        self.steps_per_epoch = config.schedule.steps_per_epoch or self.plan.steps_per_epoch
        self.total_steps = config.schedule.epochs * self.steps_per_epoch
        identities, cameras = self.shards.training_identities().tolist(), list(self.shards.camera_index)
        about = {"run": config.name, **data_about(self.shards.card)}
        self.header = WeightsHeader(
            model=config.model, clip=config.clip, identities=identities, cameras=cameras, about=about
        )
        self.recipe = recipe(config, self.shards, self.steps_per_epoch)
        self.resumed: Path | None = self._find_checkpoint() if resume else None
        self.changes: dict[str, tuple[object, object]] = {}
        self._build(self._read(self.resumed) if self.resumed else None)

    def _find_checkpoint(self) -> Path | None:
        """The newest whole checkpoint."""
        return checkpoints.newest_whole(self.root, log.warning, self.ranks)

    def _read(self, folder: Path) -> Restored:
        """A checkpoint, once it is known to be of this recipe or one that may become it."""
        restored = snapshot.read(folder, self.config, self.header, self.ranks, self.allowed)
        self.changes = changes(folder, restored.state.recipe, self.recipe, self.allowed)
        log.info("resuming from %s", folder)
        for key, (old, new) in self.changes.items():
            log.warning("%s: %r from here on, before %r (--change)", key, new, old)
        return replace(restored, state=replace(restored.state, recipe=self.recipe))

    def _build(self, restored: Restored | None) -> None:
        """Network, losses, engine, average and reader, as new or as restored."""
        config, ranks = self.config, self.ranks
        torch.manual_seed(config.seed)  # the same initial weights on every rank
        model = config.model.model_copy(update={"weights": None}) if restored else config.model
        cameras = len(self.shards.camera_index)
        sharded = config.model.classifiers == "sharded"
        group = ClassGroup.of(ranks, config.training.class_group) if sharded else None
        network = start_network(model, config.clip, self.plan.num_identities, cameras, self.shards, group)
        widths = network.width, network.part_width
        owners = ranks if (config.scopes > 1 or sharded) and ranks.world_size > 1 else None
        criterion = Criterion(config.loss, self.plan.num_identities, *widths, config.model.parts, owners)
        if restored:
            snapshot.restore_before(restored, network, criterion)
        network.checkpoint_activations = config.training.activation_checkpointing
        paths = stochastic_depth.use_clip_draws(network)
        if config.training.compile:
            network.compile()

        module = TrainedModule(network, criterion).to(ranks.device)
        optimizer = build_optimizer(module.named_parameters(), config.optimizer)
        self.state = restored.state if restored else TrainingState(recipe=self.recipe)
        same_optimizer = "optimizer.name" not in self.changes
        steps = self.state.step if same_optimizer else 0
        classes = ClassOptimizer(network.classes, config.optimizer, optimizer, steps) if sharded else None
        self.engine = Engine(module, optimizer, config, ranks.device, steps, classes)
        self.network: KeyReID = module.network
        self.schedule = build_schedule(optimizer, config.schedule, config.optimizer.lr, self.steps_per_epoch)
        self.average = WeightAverage(self.network, config.training.ema_decay) if config.training.ema_decay else None
        if restored:
            snapshot.restore_after(restored, self.engine, self.average, same_optimizer)

        self.stepper = Stepper(self.engine, config, ranks, paths)
        self.writer = BackgroundWriter(self.root, config.training.keep_checkpoints, ranks)
        epoch, step = divmod(self.state.step, self.steps_per_epoch)
        batches = self.plan.batches(epoch, step, ranks.rank, ranks.world_size, self.steps_per_epoch, self.shards.files)
        # One reader and one iterator for the life of the run: see shards/dali.py.
        self.reader = open_reader(self.shards, batches, config, device=ranks.device)

    def run(self) -> dict:
        """Train to the end; gives the last evaluation.

        Raises:
            Interrupted: a stop signal came; everything is saved.
            KeyreidError: too many bad steps in a row, a checkpoint that cannot be written, an unreadable sample.
        """
        try:
            if self.resumed and self.ranks.first:  # the start before may have been killed in the midst of it
                checkpoints.settle(self.root, self.state, self.config.training.keep_checkpoints)
            self._introduce()
            result = self._evaluate() if self._evaluation_is_due() else None  # the run was stopped before it
            if result and self.ranks.first:
                self.writer.write(self.state)
            result = self._steps() or result
            self.writer.wait()
            return result or self._evaluate()
        finally:
            self.writer.close()
            self.reader.close()

    def _introduce(self) -> None:
        """The log's first lines: what really runs."""
        config, training, ranks = self.config, self.config.training, self.ranks
        parameters = count_parameters(self.network) + self.network.sharded_parameters
        backend = torch.distributed.get_backend()
        log.info(
            f"engine: {self.engine.about}, {training.precision} by {training.casting}, {ranks.world_size} rank(s) over "
            f"{backend} on {ranks.device}"
        )
        log.info(f"reader: {config.data.reader} ({type(self.reader).__name__})")
        log.info(
            f"data: {self.shards.card['name']}, {self.plan.num_identities} training identities, batch "
            f"{config.data.identities} x {config.data.tracklets} tracklets x {config.clip.frames} frames, "
            f"{self.steps_per_epoch} steps an epoch"
        )
        model = config.model
        log.info(f"network: {model.backbone}, guidance {model.guidance}, {parameters / 1e6:.1f} M parameters")
        log.info("%s", described(config, self.network.width, self.plan.num_identities, ranks.world_size))
        if self.network.classes is not None:
            held = self.network.sharded_parameters / self.network.classes.group.place.world_size
            log.info(f"classes: shared out, {held / 1e6:.1f} M parameters on each rank")
        counts = {"ranks": ranks.world_size, "parameters": parameters, "num_identities": self.plan.num_identities}
        self.tracker.params(counts)
        for key, values in self.changes.items():
            self.tracker.again_from(self.state.step)
            self.tracker.tag(f"keyreid.changed.{key}", "{!r} -> {!r} at step {}".format(*values, self.state.step))

    def _steps(self) -> dict | None:
        """All steps that are left; gives the last evaluation among them."""
        training, result = self.config.training, None
        measurable = self.ranks.device.type == "cuda" and training.zero_stage < 3
        factor = mfu_factor(self.network, self.config, self.ranks.world_size) if measurable else None
        meter = Meter(self.plan.batch_size, self.total_steps, factor)
        numbers = range(self.state.step, self.total_steps)
        if sys.stderr.isatty() and self.ranks.first:
            from keyreid.progress import track

            numbers = track(numbers, len(numbers), self.config.name, "steps")
        self.engine.train()
        with profiled(self.config, self.ranks, self.tracker, self.state.step) as profiler:
            for step in numbers:
                batch = next(self.reader)
                self.schedule.step_update(step)
                outcome = self.stepper.step(batch, step)
                profiler.step()
                self.state = replace(self.state, step=step + 1, steps_per_epoch=self.steps_per_epoch)
                self._count(outcome, batch, meter)
                epoch, left = divmod(step + 1, self.steps_per_epoch)
                if (step + 1) % training.log_every_steps == 0 or step + 1 == self.total_steps:
                    self._log(meter, epoch - (left == 0))
                stopping, failed = self._vote(step + 1)
                if failed:
                    raise self.writer.error or CheckpointError("another rank could not write its part of a checkpoint")
                if not stopping and self._evaluation_is_due():
                    result = self._evaluate()
                if stopping or self._saves_after(step + 1, epoch if left == 0 else None):
                    self._save(epoch if left == 0 else None)
                if stopping:
                    self.writer.wait()
                    raise Interrupted(f"{self.stop.signal.name if self.stop.signal else 'a signal on another rank'}")
                if self.on_evaluation and self.state.evaluated_step == step + 1:
                    self.writer.wait()
                    folder = self.root / checkpoints.folder_name(step + 1)
                    said = {**self._numbers, **result["metrics"]}
                    if not self.ranks.from_first(self.ranks.first and self.on_evaluation(epoch, said, folder)):
                        raise Interrupted("ended after an evaluation")
        return result

    def _vote(self, step: int) -> list[bool]:
        """Whether a rank is to stop, and whether one failed to write; asked only every so many steps."""
        if step % self.config.training.vote_every_steps and step != self.total_steps:
            return [False, False]
        return self.ranks.agree(self.stop.signal is not None, self.writer.error is not None)

    def _count(self, outcome: StepResult, batch: ClipBatch, meter: Meter) -> None:
        """What follows from a step that was applied, or not; an error after too many that were not, in a row."""
        if outcome.applied:
            self._bad_in_a_row = 0
            meter.add(outcome.terms, outcome.norm)
            if self.average:
                self.average.update()
            return
        self._bad_in_a_row += 1
        self.state = replace(self.state, bad_steps=self.state.bad_steps + 1)
        log.warning("step %d was not applied: loss %s (%d in a row)", self.state.step, outcome.loss, self._bad_in_a_row)
        self.tracker.metrics({"bad_steps": self.state.bad_steps}, self.state.step)
        if self._bad_in_a_row < self.config.training.max_bad_steps:
            return
        ranks = self.stepper.bad_ranks(batch)
        keys = [key for keys in self.ranks.from_all(list(batch.keys)) for key in keys]
        self.writer.wait()
        raise KeyreidError(
            f"{self._bad_in_a_row} steps in a row were not applied, the last with loss {outcome.loss}. Ranks whose "
            f"features are not finite: {ranks or 'none'}; batch: {', '.join(keys)}; "
            f"last checkpoint: {checkpoints.named(self.root, 'latest')}. Lower optimizer.lr, "
            "set training.clip_gradient_norm, or look at these tracklets"
        )

    def _log(self, meter: Meter, epoch: int) -> None:
        if not meter.steps:  # none was applied: the warnings have said so
            return
        step, lr = self.state.step, self.schedule.optimizer.param_groups[0]["lr"]
        values = meter.report(step, lr, self.reader.wait_seconds)
        log.info("%s", line(values, epoch, self.config.schedule.epochs, step, self.total_steps))
        self._numbers = {f"train/{name}": value for name, value in values.items()}
        self.tracker.metrics(self._numbers, step)

    def _evaluation_is_due(self) -> bool:
        """At the end of an epoch that is evaluated, unless that was done."""
        epoch, left = divmod(self.state.step, self.steps_per_epoch)
        every = self.config.evaluation.every_epochs
        wanted = epoch == self.config.schedule.epochs or bool(every and epoch and epoch % every == 0)
        return left == 0 and wanted and self.state.evaluated_step != self.state.step

    def _evaluate(self) -> dict:
        """Embed and judge the test split with the weights that would be used: the average where there is one."""
        from keyreid.evaluation.judging import evaluate

        part, folder = self.judged, RunFolder(self.config.run_dir).evaluation / checkpoints.folder_name(self.state.step)
        newest = folder.parent / "vectors.parquet"  # large: kept of the newest evaluation only, and not logged
        kept = {"vectors_path": newest, "weights": {"name": f"{self.config.name} step {self.state.step}"}}
        result = evaluate(self._weights_to_use(), self.shards, self.config, folder, self.ranks, part=part, **kept)
        self.state = self.state.evaluated(result["metrics"][f"{self.config.evaluation.protocol}/mAP"])
        self.tracker.params({f"{part}/dataset": result["dataset"]})
        self.tracker.metrics({f"{part}/{name}": value for name, value in result["metrics"].items()}, self.state.step)
        self.tracker.artifact(folder, f"evaluation/{folder.name}")
        return result

    def _weights_to_use(self) -> KeyReID:
        """The engine's own network, or a whole float32 copy where its weights are sharded, cast or averaged."""
        whole = next(self.network.parameters()).dtype == torch.float32 and self.config.training.zero_stage < 3
        if whole and self.average is None:
            return self.network
        found = self.average.full().items() if self.average else self.engine.weights()
        weights = {name.removeprefix(snapshot.NETWORK): value for name, value in found}
        buffers = {name: value for name, value in self.network.state_dict().items() if name not in weights}
        model = self.config.model.model_copy(update={"weights": None})
        copy = build_model(model, self.config.clip, self.plan.num_identities, len(self.shards.camera_index))
        copy.load_state_dict(weights | buffers)
        return copy.to(self.ranks.device)

    def _saves_after(self, step: int, epoch: int | None) -> bool:
        training = self.config.training
        by_steps = training.checkpoint_every_steps is not None and step % training.checkpoint_every_steps == 0
        by_epochs = epoch is not None and epoch % training.checkpoint_every_epochs == 0
        return by_steps or by_epochs or step in (self.total_steps, self.state.best_step)

    def _save(self, epoch: int | None) -> None:
        """Copy this rank's part of the state (training waits) and write it (training does not)."""
        start = time.monotonic()
        every = self.config.training.keep_every_epochs
        keep = bool(every and epoch and epoch % every == 0)
        current = replace(self.state, loss_scale=self.engine.loss_scale_state(), keep=keep)
        about = {**self.header.about, "step": current.step}  # no score: a stopped run knows it later
        self.writer.write(snapshot.take(self.engine, self.average, current, replace(self.header, about=about)))
        self.tracker.metrics({"checkpoint/stall_seconds": time.monotonic() - start}, current.step)
