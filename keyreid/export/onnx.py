"""The clip embedding as ONNX, compared with torch in onnxruntime before it is given out.

Inputs, any number of clips B: `images` uint8 [B, T, 3, H, W] (RGB), `guidance` float32 [B, T, P, Hp, Wp] in [0, 1]
(part heatmaps averaged over each patch), `cameras` int64 [B] (-1: unknown). Output: `vectors` float32 [B, D], as
`KeyReID.embed` gives; a tracklet's vector is the mean over its clips.
"""

import json
import logging
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from keyreid.errors import ConfigError, KeyreidError, install_hint
from keyreid.export.source import ExportSource
from keyreid.model import KeyReID
from keyreid.pose.parts import part_names

OPSET = 20
TOLERANCE = 1e-4  # of the largest absolute value of the vectors, or 1
CHECKED_BATCHES = (1, 2, 5)
INPUTS = ("images", "guidance", "cameras")


class ClipEmbedding(nn.Module):
    """From pictures as they are decoded to the evaluation vector."""

    def __init__(self, network: KeyReID) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor, guidance: torch.Tensor, cameras: torch.Tensor) -> torch.Tensor:
        """See the module's docstring for shapes and ranges."""
        normalised = images.float() * (2 / 255) - 1
        return self.network.embed(normalised, self.network.guidance.scaled(guidance), cameras)


def export_onnx(source: ExportSource, out: Path) -> float:
    """Write the embedding of clips; large networks get a second file, OUT.data.

    Returns:
        The largest difference between onnxruntime and torch, relative to TOLERANCE's scale.

    Raises:
        ConfigError: the packages are missing.
        KeyreidError: onnxruntime gives other vectors; nothing is written then.
    """
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise ConfigError(f"ONNX export needs {', '.join(missing)}; {install_hint('export')}")
    if out.suffix != ".onnx":
        raise ConfigError(f"{out}: the name of an ONNX file ends in .onnx")
    module = ClipEmbedding(source.network).eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        path = Path(folder) / out.name
        batch = torch.export.Dim("batch", min=1)
        for name in ("onnxscript", "onnx_ir"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                # a batch that is equal to no other size, so that nothing is taken for constant by accident
                example_inputs(source.network, 3, seed=0),
                dynamo=True,
                dynamic_shapes={name: {0: batch} for name in INPUTS},
                input_names=list(INPUTS),
                output_names=["vectors"],
                opset_version=OPSET,
                verbose=False,
            )
        program.model.metadata_props.update(_metadata(source))
        program.save(str(path))  # protobuf ends at 2 GiB; from 1.5 GiB on the weights lie beside the graph
        difference = compare(module, path)
        if difference > TOLERANCE:
            why = f"onnxruntime's vectors differ from torch's by {difference:.2g}, more than {TOLERANCE}"
            raise KeyreidError(f"{out}: not written: {why}")
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the graph last, when its data is there
            file.replace(out.with_name(file.name))
    return difference


def compare(module: ClipEmbedding, path: Path) -> float:
    """The largest difference of vectors between onnxruntime and torch, over several batch sizes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for number, clips in enumerate(CHECKED_BATCHES):
        inputs = example_inputs(module.network, clips, seed=number)
        with torch.no_grad():
            expected = module(*inputs).numpy()
        given = session.run(["vectors"], {name: value.numpy() for name, value in zip(INPUTS, inputs, strict=True)})[0]
        worst = max(worst, float(np.abs(given - expected).max() / max(1.0, np.abs(expected).max())))
    return worst


def example_inputs(network: KeyReID, clips: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random pictures, guidance and cameras (unknown ones among them)."""
    draw = torch.Generator().manual_seed(seed)
    shape = (clips, network.frames, 3, *network.image_size)
    images = torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8)
    guidance = torch.rand(clips, network.frames, network.parts, *network.patch_grid, generator=draw)
    return images, guidance, torch.randint(-1, max(1, network.num_cameras), (clips,), generator=draw)


def _metadata(source: ExportSource) -> dict[str, str]:
    network = source.network
    height, width = network.image_size
    grid = ", ".join(map(str, (network.frames, network.parts, *network.patch_grid)))
    return {
        "format": "keyreid-onnx/1",
        "images": f"uint8 [batch, {network.frames}, 3, {height}, {width}], RGB",
        "guidance": f"float32 [batch, {grid}] in [0, 1]: part heatmaps averaged over patches",
        "parts": json.dumps(part_names(network.parts)),
        "cameras": f"int64 [batch], 0 to {network.num_cameras - 1}, or -1 for an unknown one",
        "vectors": f"the first {network.width} numbers are the global feature; compare by Euclidean distance",
        "weights": source.file.name,
        "model": source.header.model.model_dump_json(),
    }
