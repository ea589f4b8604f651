"""Evaluation of saved weights: on one split of a dataset, or on all of them with mean and deviation."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

from keyreid.checkpoints.trained import Trained, open_config, open_trained
from keyreid.config import Config
from keyreid.embedding.features import extract
from keyreid.embedding.vectors import Vectors
from keyreid.errors import ConfigError
from keyreid.evaluation.report import COUNTS, RATES, combine
from keyreid.evaluation.run import judge_vectors, test_positions
from keyreid.files import writing
from keyreid.shards.shard_set import ShardSet
from keyreid.tracking import RUN_ID, Tracker


class Evaluation:
    """What `keyreid evaluate` was asked for. Every rank makes one and calls the same method.

    Args:
        weights: as `open_trained` takes them; may hold `{split}`. None with `vectors`.
        overrides, config, shards: see `open_trained`.
        protocols: names; none: the configuration's.
        vectors: a file of vectors to judge instead of embedding.
        out: folder to write to; default one beside the weights.
    """

    def __init__(
        self,
        weights: str | None,
        overrides: Sequence[str],
        config: Path | None,
        shards: str | None,
        protocols: Sequence[str],
        vectors: Path | None,
        out: Path | None,
        rank: int,
        world_size: int,
        device: torch.device,
    ) -> None:
        self.weights = weights
        self.settings = (config, overrides, shards)
        self.protocols = protocols
        self.vectors = None if vectors is None else Vectors.load(vectors)
        self.out = out if out is not None or vectors is None else vectors.parent
        self.ranks = (rank, world_size, device)

    def one_split(self, number: int | None = None) -> dict[str, Any]:
        """`judge_vectors`' result on one split (None: the configuration's), with the `folder` it was written to."""
        trained, config = self._open(number or 0)
        config = _on_split(config, config.data.split_number if number is None else number)
        shards = ShardSet.from_config(config.data)
        folder = self._folder(trained, shards)
        vectors = self._embed(trained, shards, config, [config.data.split_number], folder)
        result = self._judge(trained, shards, config, folder, vectors)
        self._track(trained, config, result, folder, result["files"])
        return {**result, "folder": str(folder)}

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
        folder = self._folder(trained, shards)
        weights_by_split = self.weights is not None and "{split}" in self.weights
        vectors, results = None, []
        if not weights_by_split:
            vectors = self._embed(trained, shards, config, splits, folder)
        for number in splits:
            own = folder / f"split-{number}"
            if weights_by_split:
                trained, config = self._open(number)
                vectors = self._embed(trained, shards, config, [number], own)
            results.append(self._judge(trained, shards, _on_split(config, number), own, vectors))
        result = mean_over_splits(results, shards.card["name"])
        self._track(trained, config, result, folder, [file for split in results for file in split["files"]])
        return {**result, "folder": str(folder)}

    def _embed(
        self, trained: Trained | None, shards: ShardSet, config: Config, splits: Iterable[int], folder: Path
    ) -> Vectors | None:
        """The vectors of these splits' test tracklets on the first rank, kept in `folder`."""
        if self.vectors is not None:
            return self.vectors
        known = trained.knows_cameras(shards)
        if self.ranks[0] == 0:
            _print_notes(trained, shards, splits, known)
        sides = (side for number in splits for side in test_positions(shards, number))
        wanted = sorted({position for side in sides for position in side})
        vectors = extract(trained.network, shards, wanted, config, *self.ranks, known)
        if vectors is not None:
            vectors.save(folder / "vectors.npz")
        return vectors

    def _judge(
        self, trained: Trained | None, shards: ShardSet, config: Config, folder: Path, vectors: Vectors | None
    ) -> dict[str, Any]:
        model = None if trained is None else trained.network
        return judge_vectors(vectors, model, shards, config, folder, *self.ranks, self.protocols)

    def _track(
        self, trained: Trained | None, config: Config, result: dict[str, Any], folder: Path, files: Sequence[str]
    ) -> None:
        """Log to MLflow where a run or a configuration says to which: as a run of its own, below the training's."""
        run = None if trained is None else trained.run
        if self.ranks[0] > 0 or (run is None and self.settings[0] is None and config.tracking.uri is None):
            return
        output = Path(config.output) if run is None else run.path.parent
        known = None if run is None else run.tracking / RUN_ID
        parent = {"mlflow.parentRunId": known.read_text().strip()} if known is not None and known.is_file() else {}
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

    def _open(self, number: int) -> tuple[Trained | None, Config]:
        config, overrides, shards = self.settings
        if self.weights is None:
            return None, open_config(config, overrides, shards)
        trained = open_trained(self.weights.replace("{split}", str(number)), config, overrides, shards)
        trained.network.to(self.ranks[2])
        return trained, trained.config

    def _folder(self, trained: Trained | None, shards: ShardSet) -> Path:
        """Where results go; made before the long work, which would be lost if it could not be."""
        name = shards.card["name"]
        if self.out is not None:
            folder = self.out
        elif trained.run is None:
            folder = trained.file.with_name(f"{trained.file.stem}-evaluation-{name}")
        else:
            folder = trained.run.evaluation / f"{name}-{trained.file.parent.name}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder


def mean_over_splits(results: Sequence[dict[str, Any]], dataset: str) -> dict[str, Any]:
    """One object of several splits' results: rates are means, `RATE_deviation` sample standard deviations.

    Counts are means too (whole numbers where the splits agree), `cmc` the mean curve; `splits` holds each split's own.
    """
    scores = {}
    for name in results[0]["protocols"]:
        each = [result["protocols"][name] for result in results]
        rates = {rate: fmean(split[rate] for split in each) for rate in RATES}
        deviations = {f"{rate}_deviation": stdev(split[rate] for split in each) for rate in RATES}
        counts = {key: fmean(split[key] for split in each) for key in COUNTS}
        counts = {key: int(value) if math.floor(value) == value else value for key, value in counts.items()}
        curve = [fmean(values) for values in zip(*(split["cmc"] for split in each), strict=True)]
        scores[name] = {"protocol": name, **rates, **deviations, **counts, "cmc": curve}
    about = {key: results[0][key] for key in ("part", "distance", "rerank")}
    return combine(
        scores, f"{dataset}, {len(results)} splits", **about, splits=[result["protocols"] for result in results]
    )


def _on_split(config: Config, number: int) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"split_number": number})})


def _print_notes(trained: Trained, shards: ShardSet, splits: Iterable[int], cameras_known: bool) -> None:
    """What a reader of the scores must know about weights and data."""
    if not cameras_known and trained.network.backbone.camera is not None:
        print("note: the weights were trained on other cameras; the mean of their camera embeddings is used")
    for number in splits:
        seen = trained.trained_on(shards, test_positions(shards, number)[0])
        if seen:
            print(f"note: split {number}: the weights were trained on {len(seen)} of its test identities")
