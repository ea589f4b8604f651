"""Training of the small pose network for rendered walkers (`keyreid pose-train`).

Pictures are rendered for it, by several cities of cameras so that the looks of none is learnt by heart, each moved,
zoomed and coarsened a little, and mirrored half of the time; their fields are encoded once, by OpenPifPaf's encoders,
and kept in memory (about 0.3 MB each). What OpenPifPaf learns with its own losses in days on many GPUs, plain ones
learn here in minutes on a core: cross entropy for confidences, distances for vectors and scales. The network's average
over the last steps is what is written and judged, by the real decoder, on people and cameras that training never saw.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from keyreid.pose import keypoint_files, pifpaf
from keyreid.pose.parts import KEYPOINT_FLIP
from keyreid.pose.pictures import PADDING_COLOUR, choose, decode, fit
from keyreid.pose.quality import judge_keypoints
from keyreid.progress import track
from keyreid.synthetic import walkers

LEARNING_RATE, WEIGHT_DECAY = 3e-3, 1e-4
UPSAMPLE = 2  # the heads' grid has a stride of 4 pixels
# Of confidence where a joint (CIF) or an association (CAF) is. OpenPifPaf's decoder drops associations below 0.3 and
# joints below 0.15, and what it dropped was most of what was wrong; with one person in the picture, a joint too many
# does less harm.
POSITIVE_WEIGHTS = (10.0, 20.0)
DECIDED_CELLS = 8.0  # vectors that miss by more count as missing by so much
CITIES = 8
ONE_FRAME_EACH = {"frames": (1, 1), "tracklets": 1, "junk": 0}
HELD_OUT_SEED = 10_000  # far from the cities' seeds
PICTURES_A_PERSON = 5.4  # of `walkers.render` with one frame a tracklet; only sets how many people are drawn

Example = tuple[np.ndarray, np.ndarray]  # picture [H, W, 3], true keypoints [17, 3]


@dataclass(frozen=True)
class TrainingSettings:
    """The recipe; the defaults made the weights in the repository."""

    pictures: int = 4800
    epochs: int = 8
    batch: int = 8
    seed: int = 0


def train(
    out: Path, settings: TrainingSettings, device: str = "cpu", processes: int = 1, held_out: int = 400
) -> dict[int, dict[str, Any]]:
    """Train the network with pictures that `processes` render, and write its pose weights file.

    Gives what `judge_keypoints` says of `held_out` other walkers, by the height that they were rendered at.
    """
    pifpaf.check_weights_name(out)
    if device == "cpu":
        torch.set_num_threads(1)  # the fields are small: with more threads they wait longer than they work
    torch.manual_seed(settings.seed)
    network = pifpaf.build_network(pifpaf.WALKERS, UPSAMPLE)
    with tempfile.TemporaryDirectory(prefix="keyreid-pose-") as folder:
        people, examples = max(2, round(settings.pictures / CITIES / PICTURES_A_PERSON) + 1), []
        for city in range(CITIES):  # of every one and both heights
            seed, height = 100 * settings.seed + city, (256, 128)[city % 2]
            examples += _render(Path(folder) / str(city), people, seed, height, processes)
        examples = _shuffled(examples, settings.seed, settings.pictures)
        pictures, targets = _encode(examples, pifpaf.Encoder(network), np.random.default_rng(settings.seed))
    average = _optimise(network, pictures, targets, settings, device)
    pifpaf.save_weights(average, out)
    return {height: judge(out, height, held_out, processes) for height in (256, 128)}


def judge(weights: Path, height: int, pictures: int = 400, processes: int = 1) -> dict[str, Any]:
    """Find held-out walkers with the real decoder and compare with the truth."""
    decoder = pifpaf.PoseDecoder(pifpaf.load_network(str(weights))[0])
    found, true = [], []
    with tempfile.TemporaryDirectory(prefix="keyreid-pose-") as folder:
        people = round(pictures / PICTURES_A_PERSON) + 2
        examples = _shuffled(_render(Path(folder), people, HELD_OUT_SEED, height, processes), 0, pictures)
        for picture, keypoints in track(examples, pictures, f"held-out walkers of {height} pixels", "pictures"):
            fitted = fit(picture, pifpaf.WALKERS_LONG_EDGE)
            people = [fitted.to_picture(pose) for pose in decoder.pictures(fitted.pixels[None])[0]]
            person = choose(people, fitted.size, "score")
            found.append(np.zeros((17, 3)) if person is None else person.keypoints)
            true.append(keypoints)
    return judge_keypoints(np.stack(found), np.stack(true), np.full(len(true), height))


def _shuffled(examples: list[Example], seed: int, count: int) -> list[Example]:
    return [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))[:count]]


def _render(root: Path, people: int, seed: int, height: int, processes: int) -> list[Example]:
    """Walkers who show four joints at least, one frame a tracklet."""
    size = {"height": height, "width": height // 2}
    walkers.render(root, people, 9, seed, processes=processes, quiet=True, **size, **ONE_FRAME_EACH)
    examples = []
    for path in sorted(root.glob("bbox_*/*/*.jpg")):
        truth = keypoint_files.load(keypoint_files.path_of(root / "keypoints", path.name.split("F")[0]))
        keypoints = truth.keypoints[truth.frame_names.index(path.name)]
        if (keypoints[:, 2] > 0).sum() >= 4:
            examples.append((decode(path.read_bytes()), keypoints))
    return examples


def _encode(
    examples: Sequence[Example], encoder: pifpaf.Encoder, rng: np.random.Generator
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Pictures uint8 [N, 3, 129, 65] and their fields, float16 [N, fields, values, h, w] for each head."""
    pictures, fields = [], ([], [])
    for picture, keypoints in track(examples, len(examples), "encoding", "pictures"):
        picture, keypoints = _move(picture, keypoints, rng)
        fitted = fit(picture, pifpaf.WALKERS_LONG_EDGE)
        pictures.append(torch.from_numpy(fitted.pixels).permute(2, 0, 1))
        inside = keypoints * [*fitted.scale, 1] + [*fitted.offset, 0]
        height, width = fitted.pixels.shape[:2]
        for kept, field in zip(fields, encoder(inside.astype(np.float32), width, height), strict=True):
            kept.append(field.half())
    return torch.stack(pictures), [torch.stack(kept) for kept in fields]


def _move(picture: np.ndarray, keypoints: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Move and zoom a picture a little, and take detail from some, as small crops that were enlarged have lost it."""
    height, width = picture.shape[:2]
    zoom = np.exp(rng.uniform(-0.25, 0.12))
    shift = rng.uniform(-0.06, 0.06, 2) * (width, height) + (1 - zoom) / 2 * np.array([width - 1, height - 1])
    matrix = np.array([[zoom, 0, shift[0]], [0, zoom, shift[1]]])
    border = PADDING_COLOUR if rng.random() < 0.5 else rng.integers(0, 256, 3).tolist()
    picture = cv2.warpAffine(picture, matrix, (width, height), borderMode=cv2.BORDER_CONSTANT, borderValue=border)
    if rng.random() < 0.5:
        detail = rng.uniform(0.35, 0.9)
        small = cv2.resize(picture, None, fx=detail, fy=detail, interpolation=cv2.INTER_AREA)
        picture = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR)
    moved = keypoints * [zoom, zoom, 1] + [*shift, 0]
    outside = (moved[:, :2] < 0).any(1) | (moved[:, :2] >= (width, height)).any(1)
    moved[outside, 2] = 0
    return picture, moved


def _optimise(network, pictures: torch.Tensor, targets: list[torch.Tensor], settings: TrainingSettings, device: str):
    """The network's average over the last steps."""
    network = network.to(device, memory_format=torch.channels_last).train()
    average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
    optimizer = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    skeleton = np.array(network.head_metas[1].skeleton) - 1
    steps = len(pictures) // settings.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, settings.epochs * steps, pct_start=0.15)
    for epoch in range(settings.epochs):
        order, total = torch.randperm(len(pictures)), 0.0
        for step in track(range(steps), steps, f"epoch {epoch + 1} of {settings.epochs}", "batches"):
            rows = order[step * settings.batch : (step + 1) * settings.batch]
            batch, wanted = pictures[rows].to(device), [target[rows].to(device) for target in targets]
            if torch.rand(()) < 0.5:
                batch, wanted = batch.flip(-1), mirror(wanted, skeleton)
            batch = _develop(batch)
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                heads = network(batch.contiguous(memory_format=torch.channels_last))
            judged = zip(heads, wanted, POSITIVE_WEIGHTS, strict=True)
            loss = sum(_loss(head.float(), target.float(), weight) for head, target, weight in judged)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 100.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(network)
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / steps:.1f}", flush=True)
    return average.module.cpu().eval()


def mirror(targets: Sequence[torch.Tensor], skeleton: np.ndarray) -> list[torch.Tensor]:
    """The fields of the mirrored pictures: columns and left and right change places, x turns round.

    Fields are CIF [N, 17, 5, h, w] and CAF [N, bones, 9, h, w]; the skeleton [bones, 2] has the joints of each bone.
    """
    cif, caf = (target.flip(-1) for target in targets)
    cif = cif[:, KEYPOINT_FLIP]
    cif[:, :, 1] *= -1
    bones, partners = ([tuple(bone) for bone in joints.tolist()] for joints in (skeleton, KEYPOINT_FLIP[skeleton]))
    turned = torch.tensor([partner not in bones for partner in partners])
    caf = caf[:, [bones.index(p[::-1] if t else p) for p, t in zip(partners, turned, strict=True)]]
    caf[:, turned] = caf[:, turned][:, :, [0, 3, 4, 1, 2, 6, 5, 8, 7]]
    caf[:, :, [1, 3]] *= -1
    return [cif, caf]


def _loss(field: torch.Tensor, target: torch.Tensor, positive_weight: float) -> torch.Tensor:
    """Loss of one head, a picture's mean.

    In training it gives [N, fields, 2 + 3 V, h, w]: width (unused), confidence, vectors, scales. The encoder's target
    is [N, fields, 1 + 4 V, h, w]; NaN is undefined.
    """
    vectors, confidence = (field.shape[2] - 2) // 3, target[:, :, 0]
    known, weight = ~confidence.isnan(), torch.tensor(positive_weight, device=field.device)
    weighed = {"reduction": "none", "pos_weight": weight}
    entropy = F.binary_cross_entropy_with_logits(field[:, :, 1], confidence.nan_to_num(0.0), **weighed)
    total = entropy[known].sum()
    n, f, y, x = (confidence > 0).nonzero(as_tuple=True)
    field, target = field[n, f, :, y, x], target[n, f, :, y, x]
    for v in range(vectors):
        miss = field[:, 2 + 2 * v : 4 + 2 * v] - target[:, 1 + 2 * v : 3 + 2 * v]
        total = total + (miss.square().sum(1) + 1e-4).sqrt().clamp(max=DECIDED_CELLS).sum()
        true_scale = target[:, 1 + 3 * vectors + v]
        known = true_scale.isfinite()  # a person of fewer than three joints has no scale
        scale = F.softplus(field[known, 2 + 2 * vectors + v])
        total = total + 0.2 * ((scale - true_scale[known]).abs() / (true_scale[known] + 0.1)).sum()
    return total / len(confidence)


def _develop(pictures: torch.Tensor) -> torch.Tensor:
    """Other light, colour and grain for each picture, then normalised as the decoder's pictures are."""
    shape = (len(pictures), 3, 1, 1)
    gain = torch.exp(torch.randn(len(pictures), 1, 1, 1) * 0.2 + torch.randn(shape) * 0.1).to(pictures.device)
    offset = (torch.randn(shape) * 12).to(pictures.device)
    grain = torch.randn(pictures.shape, device=pictures.device)
    grain *= (torch.rand(len(pictures), 1, 1, 1) * 10).to(pictures.device)
    return pifpaf.normalise((pictures * gain + offset + grain).clamp(0, 255))
