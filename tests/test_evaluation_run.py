"""From weights and shards to scores, a page of pictures, and means over splits, by function and by command."""

import json
import statistics

import mlflow
import numpy as np
import pytest
import torch
from evaluation_toys import save_weights, toy_config, toy_model, toy_network, toy_shards
from packed import index_only
from typer.testing import CliRunner

from keyreid.checkpoints.released import to_released
from keyreid.checkpoints.trained import open_trained
from keyreid.cli import app
from keyreid.config import EvaluationConfig
from keyreid.embedding.distance import pairwise
from keyreid.embedding.reranking import rerank
from keyreid.embedding.vectors import Vectors
from keyreid.errors import CheckpointError, ConfigError, DataError, KeyreidError
from keyreid.evaluation.judging import check_judgeable, evaluate
from keyreid.evaluation.protocols import judge
from keyreid.evaluation.ranking import query_and_gallery, rank_gallery, side_of

SETTINGS = ["training.precision=fp32", "data.reader=plain", "data.workers=1", "evaluation.pictures=1"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return toy_network(folder)


@pytest.fixture(scope="module")
def evaluated(toy, tmp_path_factory):
    """The toy's evaluation through the command, by all protocols."""
    shards, _, _, weights = toy
    out = tmp_path_factory.mktemp("evaluated")
    protocols = [f"--protocol={name}" for name in ("torchreid", "official", "inclusive", "released")]
    arguments = ["evaluate", f"--shards={shards.location}", f"--out={out}", f"--json={out}/too.json", *protocols]
    run = CliRunner().invoke(app, [*arguments, str(weights), *SETTINGS])
    assert run.exit_code == 0, run.output
    return out, run.output


def rows_of(vectors, shards, split):
    """The embeddings of a split's tracklets."""
    return vectors.embeddings[vectors.rows_of(shards.index.keys(shards.select(split)))]


def test_scores_are_the_protocols_of_the_vectors(toy, evaluated):
    out, output = evaluated
    result = json.loads((out / "scores.json").read_text())
    vectors = Vectors.load(out / "vectors.parquet")
    shards = toy[0]
    query, gallery = (rows_of(vectors, shards, split) for split in ("query", "gallery"))
    sides = (side_of(shards, positions) for positions in query_and_gallery(shards, 0))
    expected = judge(pairwise(query, gallery), *sides, "torchreid").as_dict()
    assert {name: result[name] for name in expected} == expected
    assert (result["queries"], result["gallery"]) == (4, 12)
    assert result["protocols"]["official"]["gallery"] == result["protocols"]["inclusive"]["gallery"] == 16
    assert (result["dataset"], result["distance"], result["rerank"], result["part"]) == (
        "toy",
        "euclidean",
        False,
        "test",
    )
    assert f"{100 * expected['mAP']:.2f} %" in output
    assert "clips/s on 1 rank(s)" in output
    assert json.loads((out / "too.json").read_text())["metrics"] == result["metrics"]


def test_reranking_replaces_the_distances(toy, evaluated):
    vectors, shards = Vectors.load(evaluated[0] / "vectors.parquet"), toy[0]
    query, gallery = (rows_of(vectors, shards, split) for split in ("query", "gallery"))
    for reranked, compare in ((False, pairwise), (True, rerank)):
        sides, settings = query_and_gallery(shards, 0), EvaluationConfig(rerank=reranked)
        ranking = rank_gallery(vectors, shards, *sides, settings, ["torchreid"])["torchreid"]
        ((rows, found),) = ranking.strips.strips()
        assert rows == slice(0, 4)
        np.testing.assert_allclose(found, compare(query, gallery), atol=2e-6)


def test_everything_is_on_one_page(evaluated):
    out, _ = evaluated
    page = (out / "index.html").read_text()
    for name in ("ranked", "cmc", "guidance", "attention"):
        assert f'src="{name}.png"' in page
        assert (out / f"{name}.png").stat().st_size > 5000
    assert "released: the published evaluator with its faulty camera filter" in page


def test_kept_vectors_need_no_second_pass(toy, evaluated, tmp_path):
    out, _ = evaluated
    for path in out.glob("*.*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())  # pictures of an evaluation with other scores
    arguments = ["evaluate", f"--vectors={out}/vectors.parquet", f"--shards={toy[0].location}", f"--out={tmp_path}"]
    run = CliRunner().invoke(app, [*arguments, "--", "evaluation.rerank=true", "evaluation.pictures=0"])
    assert run.exit_code == 0, run.output
    assert "embedded" not in run.output
    result = json.loads((tmp_path / "scores.json").read_text())
    assert result["rerank"] is True
    assert not list(tmp_path.glob("*.png")) and not (tmp_path / "index.html").exists()


def test_mlflow_has_an_evaluation_with_its_protocol_and_data_set(toy, evaluated, tmp_path):
    out, _ = evaluated
    arguments = ["evaluate", f"--vectors={out}/vectors.parquet", f"--shards={toy[0].location}", f"--out={tmp_path}"]
    store = f"sqlite:///{tmp_path}/mlflow.db"
    settings = ["evaluation.pictures=0", f"tracking.uri={store}", "evaluation.distance=cosine"]
    run = CliRunner().invoke(app, [*arguments, "--protocol=official", "--", *settings])
    assert run.exit_code == 0, run.output
    client = mlflow.MlflowClient(tracking_uri=store)
    (logged,) = client.search_runs([client.get_experiment_by_name("keyreid").experiment_id])
    result = json.loads((tmp_path / "scores.json").read_text())
    assert logged.data.metrics == {f"test/{name}": value for name, value in result["metrics"].items()}
    assert {"test/official/mINP", "test/official/valid_queries", "test/official/junk"} <= logged.data.metrics.keys()
    about = {"dataset": "toy", "protocols": "official", "part": "test", "distance": "cosine", "rerank": "False"}
    assert logged.data.params == about
    assert not list(tmp_path.glob("mlflow-*"))  # all was sent


def test_visible_distance_and_people_held_out_of_training(toy, tmp_path):
    shards, _, model, _ = toy
    config = toy_config(shards, data__holdout=0.5, evaluation__distance="visible", evaluation__pictures=0)
    held_out = type(shards).from_config(config.data)
    result = evaluate(model, held_out, config, tmp_path, part="holdout")
    assert result["dataset"] == "toy (held out of training)"
    assert result["queries"] == len(held_out.select("holdout_query"))
    assert result["valid_queries"] > 0
    assert result["files"] == [str(tmp_path / "scores.json")]
    with pytest.raises(DataError, match="no identities are held out"):
        evaluate(model, shards, toy_config(shards), tmp_path, part="holdout")


def test_what_cannot_be_judged_is_known_before_anything_is_embedded(toy):
    shards, config, _, _ = toy
    assert check_judgeable(shards, config) == 4
    assert check_judgeable(shards, toy_config(shards, evaluation__protocol="inclusive")) == 4
    one_camera = index_only(np.array([1, 1, 2]), np.array([5, 5, 5]), np.array([3, 3, 3]), split="query")
    with pytest.raises(DataError, match="split 0 has 3 queries and 0 gallery tracklets"):
        check_judgeable(one_camera, config)
    gallery = index_only(np.array([1, 1, 2]), np.array([5, 5, 5]), np.array([3, 3, 3]), split="gallery")
    gallery.select = lambda split, *_: [0] if split == "query" else [1, 2]
    with pytest.raises(DataError, match="index only: no query has a match under protocol torchreid"):
        check_judgeable(gallery, config)


def test_mean_and_deviation_over_splits(toy, tmp_path):
    _, config, model, _ = toy
    shards = toy_shards(tmp_path, splits=3)
    weights = save_weights(model, config, shards, tmp_path / "weights.safetensors")
    arguments = ["evaluate", f"--shards={shards.location}", f"--out={tmp_path / 'out'}", "--all-splits"]
    run = CliRunner().invoke(app, [*arguments, str(weights), *SETTINGS, "evaluation.pictures=0"])
    assert run.exit_code == 0, run.output
    assert "toy, 3 splits" in run.output
    assert " ± " in run.output
    assert "note: split 0: the weights were trained on 3 of its test identities" in run.output
    each = [json.loads((tmp_path / "out" / f"split-{n}" / "scores.json").read_text()) for n in range(3)]
    assert each[1]["dataset"] == "toy split 1"
    one = CliRunner().invoke(
        app, ["evaluate", f"--vectors={tmp_path}/out/vectors.parquet", f"--shards={shards.location}",
              f"--out={tmp_path}/one", "--split-number=1", f"--json={tmp_path}/one.json", "--", "evaluation.pictures=0"]
    )  # fmt: skip
    assert one.exit_code == 0, one.output
    assert json.loads((tmp_path / "one.json").read_text())["protocols"] == each[1]["protocols"]
    both = CliRunner().invoke(
        app, ["evaluate", f"--shards={shards.location}", f"--vectors={tmp_path}/out/vectors.parquet", "--all-splits",
              f"--json={tmp_path}/all.json", f"--out={tmp_path}/again", "--", "evaluation.pictures=0"]
    )  # fmt: skip
    assert both.exit_code == 0, both.output
    mean = json.loads((tmp_path / "all.json").read_text())
    values = [result["mAP"] for result in each]
    assert mean["mAP"] == pytest.approx(statistics.fmean(values))
    assert mean["mAP_deviation"] == pytest.approx(statistics.stdev(values))
    assert len(mean["splits"]) == 3
    for number in range(3):
        save_weights(toy_model(config, seed=number), config, shards, tmp_path / f"own-{number}.safetensors")
    own = CliRunner().invoke(
        app, [*arguments, f"{tmp_path}/own-{{split}}.safetensors", *SETTINGS, "evaluation.pictures=0"]
    )
    assert own.exit_code == 0, own.output
    kept = [Vectors.load(tmp_path / "out" / f"split-{number}" / "vectors.parquet") for number in range(3)]
    assert [len(vectors) for vectors in kept] == [16, 16, 16]
    first, second = (vectors.vectors[vectors.rows_of([kept[1].keys[0]])] for vectors in kept[:2])
    assert np.abs(first - second).max() > 0.01  # the same tracklet, by each split's own weights


def test_a_published_checkpoint_brings_its_own_mode(toy, tmp_path):
    shards = toy[0]
    config = toy_config(shards, model__guidance="released")
    torch.save(to_released(toy_model(config).state_dict()), tmp_path / "published.pth")
    trained = open_trained(tmp_path / "published.pth", shards=shards.location)
    assert (trained.config.model.guidance, trained.config.clip.frames, trained.config.clip.height) == (
        "released",
        2,
        64,
    )
    assert trained.knows_cameras(shards)
    arguments = ["evaluate", f"--shards={shards.location}", "--protocol=released", f"--out={tmp_path / 'out'}"]
    run = CliRunner().invoke(app, [*arguments, str(tmp_path / "published.pth"), *SETTINGS])
    assert run.exit_code == 0, run.output
    assert (tmp_path / "out" / "attention.png").exists()
    assert np.isfinite(Vectors.load(tmp_path / "out" / "vectors.parquet").vectors).all()


def test_what_cannot_be_evaluated_is_refused(toy, tmp_path):
    shards, _, _, weights = toy
    here = f"--shards={shards.location}"
    for arguments, kind, message in (
        ([str(weights)], ConfigError, "name the shards to evaluate on"),
        ([here, str(weights), "model.parts=3"], ConfigError, "model and clip come with the weights"),
        ([here, str(tmp_path)], CheckpointError, "no run, checkpoint or weights file"),
        ([here, "--all-splits", str(weights)], ConfigError, "toy has one split; leave out --all-splits"),
        ([here, "--split-number=4", str(weights)], DataError, "split_number=4, but the dataset has one split"),
        ([here, "--protocol=market", str(weights)], ConfigError, "unknown protocol 'market'"),
        (["--all-splits", "--split-number=1", str(weights)], ConfigError, "--split-number is one split"),
        (["--vectors=v.npz"], ConfigError, "or --vectors FILE with --shards"),
        ([here, f"--out={weights}/below", str(weights)], KeyreidError, "below: cannot be written: Not a directory"),
    ):
        run = CliRunner().invoke(app, ["evaluate", "--ranks=1", *arguments])
        assert isinstance(run.exception, kind), (arguments, run.exception, run.output)
        assert message in str(run.exception)
