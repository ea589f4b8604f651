"""The clip embedding as ONNX, compared with torch in onnxruntime before it is given out.

Inputs, any number of clips B: `images` uint8 [B, T, 3, H, W] (RGB), `guidance` float32 [B, T, P, Hp, Wp] in [0, 1]
(part heatmaps averaged over each patch), `cameras` int64 [B] (-1: unknown). Output: `vectors` float32 [B, D], as
`KeyReID.embed` gives; a tracklet's vector is the mean over its clips.
"""

from __future__ import annotations

import json
import logging
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn

from keyreid.errors import ConfigError, KeyreidError
from keyreid.model import KeyReID
from keyreid.pose.parts import part_names

OPSET = 20
TOLERANCE = 1e-4  # of the largest absolute value of the vectors, or 1
CHECKED_BATCHES = (1, 2, 5)
ONE_FILE_BYTES = 1_900_000_000  # protobuf ends at 2 GiB; beyond this the weights lie beside the graph
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


def export_onnx(network: KeyReID, out: Path, about: Mapping[str, str], seed: int = 0) -> float:
    """Write the embedding of clips; large networks get a second file, OUT.data.

    Args:
        network: on the CPU, in float32.
        about: further entries of the file's metadata.

    Returns:
        The largest difference between onnxruntime and torch, relative to TOLERANCE's scale.

    Raises:
        ConfigError: the packages are missing.
        KeyreidError: onnxruntime gives other vectors; nothing is written then.
    """
    _check_packages()
    if out.suffix != ".onnx":
        raise ConfigError(f"{out}: the name of an ONNX file ends in .onnx")
    import onnx

    module = ClipEmbedding(network.eval()).eval()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        path = Path(folder) / out.name
        external = sum(p.numel() * 4 for p in network.parameters()) > ONE_FILE_BYTES
        # A batch that is equal to no other size, so that nothing is taken for constant by accident.
        example = example_inputs(network, 3, seed)
        batch = torch.export.Dim("batch", min=1)
        for name in ("onnxscript", "onnx_ir"):
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                example,
                dynamo=True,
                dynamic_shapes={name: {0: batch} for name in INPUTS},
                input_names=list(INPUTS),
                output_names=["vectors"],
                opset_version=OPSET,
                verbose=False,
            )
        program.save(str(path), external_data=external)
        model = onnx.load(str(path), load_external_data=False)
        onnx.helper.set_model_props(model, {**_metadata(network), **about})
        onnx.save(model, str(path))
        difference = compare(module, path, seed)
        if difference > TOLERANCE:
            raise KeyreidError(
                f"{out}: not written: onnxruntime's vectors differ from torch's by {difference:.2g}, "
                f"more than {TOLERANCE}"
            )
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the graph last, when its data is there
            file.replace(out.with_name(file.name))
    return difference


def compare(module: ClipEmbedding, path: Path, seed: int = 0) -> float:
    """The largest difference of vectors between onnxruntime and torch, over several batch sizes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    worst = 0.0
    for number, clips in enumerate(CHECKED_BATCHES):
        inputs = example_inputs(module.network, clips, seed + number)
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


def _metadata(network: KeyReID) -> dict[str, str]:
    height, width = network.image_size
    return {
        "format": "keyreid-onnx/1",
        "images": f"uint8 [batch, {network.frames}, 3, {height}, {width}], RGB",
        "guidance": f"float32 [batch, {network.frames}, {network.parts}, {network.patch_grid[0]}, "
        f"{network.patch_grid[1]}] in [0, 1]: part heatmaps averaged over patches",
        "parts": json.dumps(part_names(network.parts)),
        "cameras": f"int64 [batch], 0 to {network.num_cameras - 1}, or -1 for an unknown one",
        "vectors": f"the first {network.width} numbers are the global feature; compare by Euclidean distance",
    }


def _check_packages() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(name)
        except ImportError:
            raise ConfigError(f"ONNX export needs {name}: pip install 'keyreid[export]'") from None
