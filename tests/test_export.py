"""Exports: the right weights of a run, ONNX that gives torch's vectors, and what the model card says."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from keyreid.checkpoints import folder as checkpoints
from keyreid.checkpoints.folder import Snapshot, TrainingState
from keyreid.checkpoints.trained import load_trained
from keyreid.checkpoints.weights_file import WeightsHeader, read_header, read_weights, write_weights
from keyreid.cli import app
from keyreid.config import ClipConfig, ModelConfig, check_config, save_config
from keyreid.errors import CheckpointError, KeyreidError
from keyreid.export import onnx
from keyreid.export.source import open_source
from keyreid.files import sha256
from keyreid.model import build_model

CLIP = ClipConfig(frames=2, height=64, width=32)


def tiny_model(guidance: str = "aligned") -> ModelConfig:
    return ModelConfig(backbone="vit_tiny_patch16_224", depth=2, local_heads=6, guidance=guidance)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two checkpoints, the first of which is the best and was evaluated; the newest is the other."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    root = folder / "checkpoints"
    torch.manual_seed(0)
    tensors = build_model(tiny_model(), CLIP, 3, 2).state_dict()
    for step in (10, 20):
        weights = {name: tensor + 0 for name, tensor in tensors.items()}
        weights["global_neck.weight"] = torch.full_like(weights["global_neck.weight"], float(step))
        ema = {**weights, "global_neck.weight": weights["global_neck.weight"] + 0.5}
        header = WeightsHeader(tiny_model(), CLIP, [5, 6, 9], [1, 2], {"run": "demo", "dataset": "toys", "step": step})
        checkpoints.save(root, Snapshot(TrainingState(step=step), header, weights, ema, {"x": torch.zeros(1)}))
    (root / "best").write_text("step-00000010")
    save_config(
        check_config({"name": "demo", "data": {"shards": "shards/toys"}, "clip": {"frames": 2}}, "t"),
        folder / "config.yaml",
    )
    scores = {
        "mAP": 0.5,
        "mINP": 0.25,
        "rank1": 0.75,
        "rank5": 1.0,
        "rank10": 1.0,
        "valid_queries": 7,
        "queries": 8,
        "gallery": 30,
    }
    scores = {"dataset": "toys", "distance": "euclidean", "rerank": False, "protocols": {"official": scores}}
    place = folder / "evaluation" / "step-00000010"
    place.mkdir(parents=True)
    (place / "scores.json").write_text(json.dumps(scores))
    return folder


def invoke(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize(
    ("options", "mark"),
    [([], 10.5), (["--no-ema"], 10.0), (["--newest"], 20.5), (["--newest", "--no-ema"], 20.0)],
)
def test_the_weights_that_were_asked_for(run, tmp_path, options, mark):
    out = tmp_path / "demo.safetensors"
    result = invoke("export", "weights", run, out, *options)
    assert result.exit_code == 0, result.output
    assert read_weights(out)["global_neck.weight"][0] == mark
    about = read_header(out).about
    assert about["step"] == int(mark) and about["averaged"] == (mark % 1 == 0.5)
    network, header = load_trained(out)  # whatever takes weights takes it
    assert network.frames == 2 and header.identities == [5, 6, 9]


def test_the_card_says_what_it_is(run, tmp_path):
    out = tmp_path / "demo.safetensors"
    invoke("export", "weights", run, out)
    text = Path(f"{out}.card.md").read_text()
    for fact in (
        sha256(out),
        "demo, step 10",
        "`toys`",
        "| official | 50.00 % | 25.00 % | 75.00 % |",
        "7 of 8",
        "loss.alpha",
    ):
        assert fact in text, fact
    for heading in ("## Network", "## Data", "## Scores", "## Training", "## Limits", "## Intended use"):
        assert heading in text
    assert "surveillance" in text and "averaged over training" in text
    # Exported again from the export alone, it still knows its scores and training.
    again = tmp_path / "again.safetensors"
    assert invoke("export", "weights", out, again).exit_code == 0
    text = Path(f"{again}.card.md").read_text()
    assert "| official | 50.00 %" in text and "loss.alpha" in text
    invoke("export", "weights", run, out, "--newest")
    assert "was not evaluated" in Path(f"{out}.card.md").read_text()


def test_bad_sources_are_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="no run, checkpoint or weights file"):
        open_source(tmp_path)
    folder = tmp_path / "step-00000010"
    folder.mkdir()
    for path in (run / "checkpoints" / "step-00000010").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "ema.safetensors").unlink()
    (folder / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="without training"):
        open_source(folder, averaged=True)
    (folder / "manifest.json").write_bytes((run / "checkpoints" / "step-00000010" / "manifest.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"damaged: .*ema\.safetensors: missing"):
        open_source(folder)
    result = invoke("export", "weights", run, tmp_path / "weights.pth")
    assert result.exit_code != 0 and "ends in .safetensors" in str(result.exception)


@pytest.mark.slow
@pytest.mark.parametrize("guidance", ["aligned", "released"])
def test_onnx_gives_the_same_vectors_for_any_number_of_clips(tmp_path, guidance, monkeypatch):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    header = WeightsHeader(tiny_model(guidance), CLIP, [5, 6, 9], [1, 2], {})
    write_weights(tmp_path / "w.safetensors", build_model(header.model, CLIP, 3, 2).state_dict(), header)
    source = open_source(tmp_path / "w.safetensors")
    network = source.network
    out = tmp_path / "onnx" / "clip.onnx"
    assert onnx.export_onnx(source, out) < 1e-5
    assert [path.name for path in out.parent.iterdir()] == ["clip.onnx"]
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    properties = session.get_modelmeta().custom_metadata_map
    assert properties["format"] == "keyreid-onnx/1" and json.loads(properties["parts"])[0] == "head"
    assert properties["weights"] == "w.safetensors" and ModelConfig(**json.loads(properties["model"])) == header.model
    images, guidance_values, cameras = onnx.example_inputs(network, 7, seed=5)
    given = session.run(
        None, {"images": images.numpy(), "guidance": guidance_values.numpy(), "cameras": cameras.numpy()}
    )[0]
    # As evaluation does it: pictures normalised by .5/.5, guidance in the mode's range.
    scaled = guidance_values * 2 - 1 if guidance == "released" else guidance_values
    with torch.no_grad():
        expected = network.embed((images.float() / 255 - 0.5) / 0.5, scaled, cameras).numpy()
    assert np.abs(given - expected).max() < 1e-4 * max(1, np.abs(expected).max())
    if guidance == "aligned":
        monkeypatch.setattr(onnx, "compare", lambda *_: 2e-4)
        with pytest.raises(KeyreidError, match="not written: onnxruntime's vectors differ"):
            onnx.export_onnx(source, tmp_path / "bad.onnx")
        assert not (tmp_path / "bad.onnx").exists()
