"""OpenPifPaf, the pose estimator: the only module that imports it.

It is an optional tool (`launch/install-pose` compiles it; AGPL-3.0, no part of keyreid) and is imported when first
used. A network finds a field of joint intensities (CIF) and one of associations between joints (CAF) on a grid;
OpenPifPaf's C++ decoder turns the fields into poses. See arXiv 2103.02440.

A **pose weights file** is a safetensors file of the network's state dict, whose metadata names the base network
(`walkers`, or one of OpenPifPaf's such as `shufflenetv2k16`) and the heads' upsampling. It holds no code.
OpenPifPaf's own checkpoints are pickled networks, which run code when they are loaded: they need the user's word
(`trust`).

    python -m keyreid.pose.pifpaf        # checks the installation: encodes a pose and decodes it
"""

import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from keyreid.errors import CheckpointError, ConfigError, KeyreidError
from keyreid.files import sha256
from keyreid.pose.parts import KEYPOINT_NAMES
from keyreid.pose.pictures import Pose
from keyreid.pose.small_net import SmallNet

WALKERS_WEIGHTS = Path(__file__).parents[1] / "assets" / "walkers_pose.safetensors"
WALKERS = "walkers"  # names both the base network and its weights in this package
WALKERS_LONG_EDGE = 128  # pixels of the pictures that it was trained on
WEIGHTS_FORMAT = "keyreid-pose-1"
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1], as OpenPifPaf normalises


@cache
def import_openpifpaf() -> ModuleType:
    """Import OpenPifPaf; KeyreidError where it is not installed, or was compiled for another PyTorch."""
    if find_spec("openpifpaf") is None:
        raise KeyreidError("OpenPifPaf is not installed; `launch/install-pose` compiles and installs it (minutes)")
    import matplotlib.cm

    if not hasattr(matplotlib.cm, "get_cmap"):  # matplotlib 3.9 dropped what OpenPifPaf asks for when imported
        matplotlib.cm.get_cmap = lambda name: matplotlib.colormaps.get_cmap(name)
    try:
        import openpifpaf
    except (ImportError, OSError) as error:
        beside = f"beside torch {torch.__version__} ({error})"
        raise KeyreidError(f"OpenPifPaf does not load {beside}; run `launch/install-pose` again") from None
    torch.ops.openpifpaf.set_quiet(True)  # it reports every growth of a buffer
    return openpifpaf


def load_network(checkpoint: str, trust: bool = False) -> tuple[torch.nn.Module, str]:
    """Load a pose network for evaluation, on the CPU; gives the SHA-256 of its file too.

    Args:
        checkpoint: `walkers` (the small network for rendered walkers that comes with keyreid), a pose weights file, an
            OpenPifPaf checkpoint file, or the name of one that OpenPifPaf publishes (downloaded once).
        trust: the checkpoint may run code while it is loaded. OpenPifPaf's own checkpoints cannot be read otherwise.

    Raises:
        CheckpointError: there is no such file or name, it is damaged, finds other joints, or needs trust.
    """
    path = WALKERS_WEIGHTS if checkpoint == WALKERS else Path(checkpoint).expanduser()
    if path.suffix == ".safetensors":
        network = _load_weights(path)
    else:
        path = path if path.is_file() else _download(checkpoint)
        if not trust:
            raise CheckpointError(
                f"{path} is a pickled network, which can run any code when loaded. If you trust where it comes from, "
                "say so with --trust; `keyreid pose-convert` then makes a weights file of it that needs no trust"
            )
        pifpaf = import_openpifpaf()
        try:
            network = torch.load(path, map_location="cpu", weights_only=False)["model"]
        except Exception as error:  # unpickling runs what the file says, so anything may be raised
            raise CheckpointError(f"{path}: not a checkpoint of OpenPifPaf ({type(error).__name__}: {error})") from None
        pifpaf.network.model_migration.model_migration(network)
        network.set_head_nets(list(network.head_nets)[:2])  # CIF, CAF
    keypoints = network.head_metas[0].keypoints
    if tuple(keypoints) != KEYPOINT_NAMES:
        raise CheckpointError(f"{path}: finds {len(keypoints)} joints {keypoints[:3]}..., not the 17 of COCO")
    return network.eval(), sha256(path)


def build_network(base: str, upsample: int = 1) -> torch.nn.Module:
    """A network with random weights on `base` (`walkers`, or one of OpenPifPaf's) and the COCO person's CIF and CAF.

    `upsample` is the factor by which the heads' grid is finer than the base network's.
    """
    pifpaf = import_openpifpaf()
    if base == WALKERS:
        base_net = SmallNet()
    elif base in pifpaf.BASE_FACTORIES:
        for kind in pifpaf.BASE_TYPES:
            if hasattr(kind, "pretrained"):
                kind.pretrained = False  # or building the network downloads ImageNet weights
        base_net = pifpaf.BASE_FACTORIES[base]()
    else:
        raise CheckpointError(f"base network {base!r} is none of {[WALKERS, *sorted(pifpaf.BASE_FACTORIES)]}")
    metas = pifpaf.plugins.coco.CocoKp().head_metas
    for meta in metas:
        meta.upsample_stride = upsample
    heads = [pifpaf.HEADS[type(meta)](meta, base_net.out_features) for meta in metas]
    network = pifpaf.network.nets.Shell(base_net, heads)
    pifpaf.network.nets.model_defaults(network)
    return network


def check_weights_name(path: Path) -> None:
    """Raise ConfigError where a pose weights file has another suffix than it is read by."""
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path}: a weights file's name ends in .safetensors")


def save_weights(network: torch.nn.Module, path: Path) -> None:
    """Write a network's pose weights file."""
    upsample = network.head_metas[0].upsample_stride
    metadata = {"format": WEIGHTS_FORMAT, "base": network.base_net.name, "upsample": str(upsample)}
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path, metadata)


class PoseDecoder:
    """OpenPifPaf's C++ decoder for one network: from pictures or fields to poses."""

    def __init__(self, network: torch.nn.Module, device: str = "cpu", threshold: float | None = None):
        """`threshold`: confidence below which a joint is missing, else 0.15; OpenPifPaf keeps one for the process."""
        pifpaf = import_openpifpaf()
        self.device, self.network = device, network.to(device)
        if threshold is not None:
            torch.classes.openpifpaf_decoder.CifCaf.set_keypoint_threshold(threshold)
            pifpaf.decoder.utils.nms.Keypoints.set_keypoint_threshold(threshold)
        self._new_decoder = lambda: pifpaf.decoder.factory(network.head_metas)

    def pictures(self, pictures: np.ndarray) -> list[list[Pose]]:
        """Find the people in pictures of one size, uint8 [N, H, W, 3], RGB; depends on these pictures alone."""
        batch = torch.from_numpy(pictures).to(self.device).permute(0, 3, 1, 2)
        with torch.inference_mode():
            heads = [head.float().cpu() for head in self.network(normalise(batch))]
        return self.fields(list(zip(*heads, strict=True)))

    def fields(self, fields: Sequence[Sequence[torch.Tensor]]) -> list[list[Pose]]:
        """Decode the fields of pictures: for each, CIF [17, 5, h, w] and CAF [19, 8, h, w]."""
        # A decoder's rounding drifts with the number of pictures that it has seen, so none outlives a batch.
        decoder = self._new_decoder()
        people = [decoder(list(heads)) for heads in fields]
        return [[Pose(pose.data.astype(np.float32), float(pose.score)) for pose in poses] for poses in people]


class Encoder:
    """OpenPifPaf's encoders: from poses to the fields that a network should give."""

    def __init__(self, network: torch.nn.Module):
        pifpaf = import_openpifpaf()
        cif, caf = network.head_metas[:2]
        self._encoders = (pifpaf.encoder.Cif(cif), pifpaf.encoder.Caf(caf))
        self._annotate = pifpaf.transforms.NormalizeAnnotations.normalize_annotations

    def __call__(self, keypoints: np.ndarray, width: int, height: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode one person's keypoints [17, 3] (confidence 0: not there) in a picture of `width` x `height`.

        Gives CIF [17, 5, h, w] and CAF [19, 9, h, w]: confidence, vectors, least widths, scales; NaN where undefined.
        """
        annotation = {"keypoints": np.where(keypoints[:, 2:] > 0, keypoints * [1, 1, 0] + [0, 0, 2], 0)}
        picture = torch.empty(3, height, width)
        meta = {"valid_area": (0.0, 0.0, width - 1.0, height - 1.0)}
        cif, caf = (encode(picture, self._annotate([annotation]), meta) for encode in self._encoders)
        return cif, caf


def normalise(pictures: torch.Tensor) -> torch.Tensor:
    """RGB pictures [N, 3, H, W] in [0, 255] as OpenPifPaf's networks take them."""
    mean, deviation = (torch.tensor(values, device=pictures.device).view(3, 1, 1) * 255 for values in (MEAN, DEVIATION))
    return (pictures - mean) / deviation


def fields_of_targets(cif: torch.Tensor, caf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The fields that a perfect network would give for an encoded pose: what the decoder takes."""
    rows, columns = torch.meshgrid(*(torch.arange(size, dtype=cif.dtype) for size in cif.shape[-2:]), indexing="ij")
    here = torch.stack([columns, rows])

    def field(target: torch.Tensor, vectors: int) -> torch.Tensor:
        confidence, regression, _, scales = target.split([1, 2 * vectors, vectors, vectors], dim=1)
        there = regression + here.repeat(vectors, 1, 1)
        return torch.cat([torch.zeros_like(confidence), confidence, there, scales], dim=1).nan_to_num(0.0)

    return field(cif, 1), field(caf, 2)


def check() -> float:
    """Encode a standing person, decode the fields with the C++ decoder, and give the largest error in pixels."""
    network = build_network(WALKERS)
    upright = np.array(import_openpifpaf().plugins.coco.constants.COCO_UPRIGHT_POSE, np.float32)
    keypoints = upright * [16, -22, 1] + [64, 228, 0]
    (poses,) = PoseDecoder(network).fields([fields_of_targets(*Encoder(network)(keypoints, 129, 257))])
    if len(poses) != 1 or not (poses[0].keypoints[:, 2] > 0).all():
        raise KeyreidError(f"OpenPifPaf's decoder found {len(poses)} people where one is: it does not work here")
    return float(np.abs(poses[0].keypoints[:, :2] - keypoints[:, :2]).max())


def _load_weights(path: Path) -> torch.nn.Module:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such pose weights file") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a pose weights file ({error})") from None
    if metadata.get("format") != WEIGHTS_FORMAT:
        raise CheckpointError(f"{path}: not a pose weights file; `keyreid pose-convert` and `pose-train` write them")
    network = build_network(metadata["base"], int(metadata["upsample"]))
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: does not fit the base network {metadata['base']}: {str(error)[:300]}") from None
    return network


def _download(name: str) -> Path:
    """The file of a checkpoint that OpenPifPaf publishes, downloaded once; its name holds the start of its hash."""
    pifpaf = import_openpifpaf()
    urls = {name: url for name, url in pifpaf.CHECKPOINT_URLS.items() if url is not pifpaf.PRETRAINED_UNAVAILABLE}
    if name not in urls:
        raise CheckpointError(f"checkpoint {name!r}: no such file, and none of {WALKERS}, {', '.join(sorted(urls))}")
    path = Path(torch.hub.get_dir()) / "checkpoints" / Path(urls[name]).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(urls[name], str(path), hash_prefix=path.stem.rpartition("-")[2])
        except (OSError, RuntimeError) as error:
            raise CheckpointError(f"{urls[name]}: {error}; download it elsewhere and give the file") from None
    return path


def main() -> None:
    """Check the installation and say what was found."""
    try:
        error, version = check(), import_openpifpaf().__version__
    except KeyreidError as failure:
        sys.exit(f"error: {failure}")
    print(f"OpenPifPaf {version} works beside torch {torch.__version__}; a pose comes back to {error:.4f} pixels")
    print("OpenPifPaf is licensed under the AGPL-3.0; it is a separate program and no part of keyreid")


if __name__ == "__main__":
    main()
