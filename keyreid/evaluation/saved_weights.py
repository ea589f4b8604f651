"""Evaluation of saved weights: on one split of a dataset, or on all of them with mean and deviation."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from keyreid.checkpoints.trained import Trained, open_config, open_trained
from keyreid.config import Config
from keyreid.distributed.ranks import Ranks
from keyreid.embedding.features import extract
from keyreid.embedding.job import weights_identity
from keyreid.embedding.vectors import Vectors
from keyreid.errors import ConfigError
from keyreid.evaluation.judging import VECTORS, check_judgeable, judge_vectors
from keyreid.evaluation.ranking import query_and_gallery
from keyreid.evaluation.scores import mean_over_splits
from keyreid.ownership import owned
from keyreid.shards.shard_set import ShardSet
from keyreid.tracking import RUN_ID, Tracker


@dataclass(frozen=True)
class SavedEvaluation:
    """What `keyreid evaluate` was asked for, see also `open_trained`. Every rank makes one and calls the same method.

    Attributes:
        weights: may hold `{split}`; None with `vectors`.
        protocols: names; none: the configuration's.
        vectors: judged instead of embedding.
        out: folder to write to; default one beside the weights.
    """

    weights: str | None
    overrides: Sequence[str] = ()
    config: Path | None = None
    shards: str | None = None
    protocols: Sequence[str] = ()
    vectors: Vectors | None = None
    out: Path | None = None
    ranks: Ranks = field(default_factory=Ranks.alone)
    verify: bool = True

    def one_split(self, number: int | None = None) -> dict[str, Any]:
        """`judge_vectors`' result on one split (None: the configuration's), with the `folder` it was written to."""
        trained, config = self._open(number or 0)
        number = config.data.split_number if number is None else number
        settings = _on_split(config, number)
        shards = ShardSet.from_config(settings.data)
        with self._folder(trained, shards) as folder:
            vectors = self._embed(trained, shards, [number], folder)
            model = trained and trained.network
            result = judge_vectors(vectors, model, shards, settings, folder, self.ranks, self.protocols)
            return self._tracked(trained, config, result, folder, result["files"])

    def all_splits(self) -> dict[str, Any]:
        """Mean and sample standard deviation (`RATE_deviation`) over all splits.

        Weights that are the same for all splits embed every tracklet once.

        Raises:
            ConfigError: the dataset has one split only.
        """
        trained, config = self._open(0)
        shards = ShardSet.from_config(config.data)
        splits = range(len(shards.card["splits"]))
        if len(splits) < 2:
            raise ConfigError(f"{shards.location}: {shards.card['name']} has one split; leave out --all-splits")
        weights_by_split = self.weights is not None and "{split}" in self.weights
        results = []
        with self._folder(trained, shards) as folder:
            vectors = None if weights_by_split else self._embed(trained, shards, splits, folder)
            for number in splits:
                own = folder / f"split-{number}"
                if weights_by_split:
                    trained, config = self._open(number)
                    vectors = self._embed(trained, shards, [number], own)
                model, settings = trained and trained.network, _on_split(config, number)
                results.append(judge_vectors(vectors, model, shards, settings, own, self.ranks, self.protocols))
            files = [file for split in results for file in split["files"]]
            return self._tracked(trained, config, mean_over_splits(results, shards.card["name"]), folder, files)

    def _open(self, number: int) -> tuple[Trained | None, Config]:
        if self.weights is None:
            return None, open_config(self.config, self.overrides, self.shards)
        location = self.weights.replace("{split}", str(number))
        trained = open_trained(location, self.config, self.overrides, self.shards, self.verify)
        trained.network.to(self.ranks.device)
        return trained, trained.config

    @contextlib.contextmanager
    def _folder(self, trained: Trained | None, shards: ShardSet) -> Iterator[Path]:
        """Where results go; had alone, from before the long work, which would be lost if it could not be."""
        name, folder = shards.card["name"], self.out
        if folder is None and trained.run is None:
            folder = trained.file.with_name(f"{trained.file.stem}-evaluation-{name}")
        elif folder is None:
            folder = trained.run.evaluation / f"{name}-{trained.file.parent.name}"
        with owned(folder, "keyreid evaluate", wait=True) if self.ranks.first else contextlib.nullcontext():
            yield folder

    def _embed(self, trained: Trained | None, shards: ShardSet, splits: Iterable[int], folder: Path) -> Vectors:
        """This rank's vectors of these splits' test tracklets, kept in `folder`."""
        known = trained is not None and trained.knows_cameras(shards)
        if self.vectors is not None:
            own = np.array_split(np.arange(len(self.vectors)), self.ranks.world_size)[self.ranks.rank]
            vectors = self.vectors[own[0] : own[-1] + 1] if len(own) else self.vectors[:0]
            if vectors.about.cameras_known is not None:
                return vectors
            # Files of the last version do not say.
            return replace(vectors, about=replace(vectors.about, cameras_known=known))
        identity = None
        if self.ranks.first:  # what a reader of the scores must know about weights and data
            if not known and trained.network.backbone.camera is not None:
                print("note: the weights were trained on other cameras; the mean of their camera embeddings is used")
            for number in splits:
                if seen := trained.trained_on(shards, query_and_gallery(shards, number)[0]):
                    print(f"note: split {number}: the weights were trained on {len(seen)} of its test identities")
            identity = weights_identity(trained)
        if trained.config.evaluation.rerank:
            check_judgeable(shards, trained.config)  # rather now than after the long work
        wanted = np.unique(np.concatenate([side for number in splits for side in query_and_gallery(shards, number)]))
        vectors = extract(trained.network, shards, wanted, trained.config, self.ranks, known, identity)
        vectors.save(folder / VECTORS, self.ranks)
        return vectors

    def _tracked(
        self, trained: Trained | None, config: Config, result: dict[str, Any], folder: Path, files: Sequence[str]
    ) -> dict[str, Any]:
        """The result with its `folder`, after MLflow, where a run or a configuration says which, has it as a run."""
        run = trained and trained.run
        whole = {**result, "folder": str(folder)}
        if not self.ranks.first or (run is None and self.config is None and config.tracking.uri is None):
            return whole
        output = Path(config.output) if run is None else run.path.parent
        known = run and run.tracking / RUN_ID
        parent = {"mlflow.parentRunId": known.read_text().strip()} if known and known.is_file() else {}  # the training
        settings = config.tracking.model_copy(update={"system_metrics": False})
        events = Path(tempfile.mkdtemp(prefix="mlflow-", dir=folder))
        with Tracker(settings, output, events, f"{config.name} on {result['dataset']}", parent) as tracker:
            about = {"dataset": result["dataset"], "protocols": ", ".join(result["protocols"])}
            tracker.params(about | {key: result[key] for key in ("part", "distance", "rerank")})
            tracker.metrics({f"{result['part']}/{name}": value for name, value in result["metrics"].items()}, step=0)
            for file in map(Path, files):
                tracker.artifact(file, "/".join(("evaluation", *file.parent.relative_to(folder).parts)))
        if tracker.all_sent:
            shutil.rmtree(events)
        return whole


def _on_split(config: Config, number: int) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"split_number": number})})
