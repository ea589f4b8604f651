"""How good the keypoints of a dataset are: numbers, histograms, a contact sheet, and the distance from true ones."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from keyreid.datasets.frames import read_frame
from keyreid.datasets.tracklet import Dataset, Frame
from keyreid.errors import DataError
from keyreid.pages import Section, write_page
from keyreid.pose import keypoint_files
from keyreid.pose.drawing import PART_COLOURS, draw_heatmaps, draw_skeleton, sheet
from keyreid.pose.heatmaps import MIN_CONFIDENCE
from keyreid.pose.parts import KEYPOINT_NAMES, joint_parts, part_joints, part_names
from keyreid.pose.pictures import decode
from keyreid.progress import track

CELL_HEIGHT, CELL_WIDTH = 256, 128  # of the contact sheet, pixels


@dataclass
class _Found:
    """The keypoints of all frames, one after another."""

    keypoints: np.ndarray  # [N, 17, 3]
    scores: np.ndarray  # [N]
    frames: list[Frame]
    tracklet_starts: np.ndarray  # [tracklets], positions in the above
    absent: list[str]  # keys of tracklets without a keypoint file
    provenance: dict


def write_quality(
    dataset: Dataset, files: Path, out: Path, samples: int = 24, truth: Path | None = None, seed: int = 0
) -> dict:
    """Write `report.html`, `statistics.png`, `contact.png` and `report.json`, whose numbers it gives.

    Args:
        samples: crops on the contact sheet: half at random, half those of the lowest scores, one for each tracklet.
        truth: folder of keypoint files to judge these, in the folder `files`, by.

    Raises:
        DataError: there is no keypoint file for any of the dataset's tracklets, or one is damaged.
    """
    found = _gather(dataset, files)
    numbers = _numbers(found)
    if truth is not None:
        numbers["accuracy"] = _accuracy(found, dataset, truth)
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(numbers, indent=1) + "\n")
    _draw_statistics(found, numbers, out / "statistics.png")
    captions = _draw_contact_sheet(found, samples, np.random.default_rng(seed), out / "contact.png")
    write_page(out / "report.html", f"Keypoints of {dataset.name}", _sections(files, numbers, found, captions))
    return numbers


def _gather(dataset: Dataset, files: Path) -> _Found:
    keypoints, scores, frames, starts, absent, provenance = [], [], [], [], [], {}
    for tracklet in track(dataset.tracklets, len(dataset.tracklets), "reading keypoints", "tracklets"):
        path = keypoint_files.path_of(files, tracklet.key)
        if not path.exists():
            absent.append(tracklet.key)
            continue
        file = keypoint_files.load(path, tracklet)
        starts.append(len(frames))
        keypoints.append(file.keypoints)
        scores.append(file.scores)
        frames += tracklet.frames
        provenance = file.provenance
    if not frames:
        raise DataError(f"{files} holds no keypoint file of {dataset.name}'s {len(dataset.tracklets)} tracklets")
    return _Found(np.concatenate(keypoints), np.concatenate(scores), frames, np.array(starts), absent, provenance)


def _numbers(found: _Found) -> dict:
    shown = found.keypoints[..., 2] > MIN_CONFIDENCE
    person = shown.any(1)
    empty_tracklets = ~np.logical_or.reduceat(person, found.tracklet_starts)
    parts = zip(part_names(6), part_joints(6), strict=True)
    scores = found.scores[person] if person.any() else np.zeros(1)
    return {
        "tracklets": len(found.tracklet_starts),
        "tracklets_without_file": len(found.absent),
        "tracklets_without_person": int(empty_tracklets.sum()),
        "frames": len(found.frames),
        "frames_with_person": float(person.mean()),
        "joints_a_frame": float(shown[person].sum(1).mean()) if person.any() else 0.0,
        "score_quantiles": {f"{q:.2f}": float(np.quantile(scores, q)) for q in (0.05, 0.5, 0.95)},
        "joint_visible": {name: float(shown[:, j].mean()) for j, name in enumerate(KEYPOINT_NAMES)},
        "part_visible": {name: float(shown[:, list(joints)].any(1).mean()) for name, joints in parts},
    }


def _accuracy(found: _Found, dataset: Dataset, truth: Path) -> dict:
    """PCK and errors against true keypoints; the height is the picture's."""
    keys = [tracklet.key for tracklet in dataset.tracklets if tracklet.key not in set(found.absent)]
    true = np.concatenate([keypoint_files.load(keypoint_files.path_of(truth, key)).keypoints for key in keys])
    if true.shape != found.keypoints.shape:
        raise DataError(f"{truth}: true keypoints of {len(true)} frames for {len(found.keypoints)} found ones")
    heights = np.array([decode(read_frame(frame)[0]).shape[0] for frame in found.frames])
    return {"truth": str(truth), **judge_keypoints(found.keypoints, true, heights)}


def _draw_statistics(found: _Found, numbers: dict, path: Path) -> None:
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(13, 7.5), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(1.25, 1, 1))
    joint_names = [name.replace("_", " ") for name in KEYPOINT_NAMES]
    edges = np.linspace(0, 1, 41)

    axes = figure.add_subplot(grid[:, 0])
    shares = list(numbers["joint_visible"].values())
    bars = axes.barh(joint_names, shares, color=PART_COLOURS[joint_parts(6)] / 255, edgecolor="0.3", lw=0.5)
    axes.bar_label(bars, [f"{share:.0%}" for share in shares], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.16), xlabel="share of frames", title=f"joints found (confidence > {MIN_CONFIDENCE})")
    parts = zip(PART_COLOURS / 255, part_names(6), strict=True)
    handles = [Patch(color=colour, label=name.replace("_", " ")) for colour, name in parts]
    axes.legend(handles=handles, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.06), frameon=False)

    axes = figure.add_subplot(grid[0, 1])
    axes.hist(found.scores[found.scores > 0], edges, color="0.35")
    person = f"a person in {numbers['frames_with_person']:.1%} of frames"
    axes.set(xlabel="score", ylabel="frames", title=f"scores; {person}")

    axes = figure.add_subplot(grid[0, 2])
    counts = (found.keypoints[..., 2] > MIN_CONFIDENCE).sum(1)
    axes.bar(np.arange(18), np.bincount(counts, minlength=18), color="0.35")
    axes.set(xlabel="joints found in a frame", ylabel="frames", title="joints per frame", xticks=range(0, 18, 2))

    axes = figure.add_subplot(grid[1, 1:])
    table = np.stack([np.histogram(column[column > 0], edges)[0] for column in found.keypoints[..., 2].T])
    norm = PowerNorm(0.5, vmin=0)  # or the few joints of low confidence would not be seen beside the many others
    extent, shares = (0, 1, 16.5, -0.5), table / len(found.frames)
    image = axes.imshow(shares, aspect="auto", extent=extent, cmap="viridis", interpolation="nearest", norm=norm)
    axes.set_yticks(range(17), joint_names, fontsize=8)
    axes.set(xlabel="confidence", title="confidence of each joint where it was found")
    figure.colorbar(image, ax=axes, label="share of frames")
    figure.savefig(path, dpi=110)


def _draw_contact_sheet(found: _Found, samples: int, rng: np.random.Generator, path: Path) -> list[str]:
    """Crops with skeletons, each beside its part heatmaps; gives what each shows."""
    random = rng.permutation(len(found.frames))[: samples - samples // 2]
    spans = pairwise([*found.tracklet_starts, len(found.scores)])
    lowest = [start + int(found.scores[start:end].argmin()) for start, end in spans]  # of each tracklet
    worst = sorted(lowest, key=lambda i: found.scores[i])[: samples // 2]
    cells, captions = [], []
    for kind, chosen in (("random", random), ("lowest scores", worst)):
        for i in chosen:
            try:
                picture = decode(read_frame(found.frames[i])[0])
            except (DataError, OSError):
                picture = np.full((CELL_HEIGHT, CELL_WIDTH, 3), 200, np.uint8)
            scale = min(CELL_HEIGHT / picture.shape[0], CELL_WIDTH / picture.shape[1])
            pair = [draw(picture, found.keypoints[i], scale) for draw in (draw_skeleton, draw_heatmaps)]
            cells.append(np.hstack(pair))
            for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
                font, number = cv2.FONT_HERSHEY_SIMPLEX, str(len(cells))
                cv2.putText(cells[-1], number, (4, 14), font, 0.42, colour, thickness, cv2.LINE_AA)
            captions.append(f"{kind}: {keypoint_files.frame_name(found.frames[i])}, score {found.scores[i]:.2f}")
    Image.fromarray(sheet(cells, 6, (CELL_HEIGHT, 2 * CELL_WIDTH))).save(path)
    return captions


def _sections(files: Path, numbers: dict, found: _Found, captions: list[str]) -> list[Section]:
    absent = f"Without keypoints: {', '.join(found.absent[:50])}{' ...' if len(found.absent) > 50 else ''}"
    contact = "Crops with skeletons and part heatmaps, in the colours of the parts above"
    sections = [
        Section(text=[str(files), *([absent] if found.absent else [])], table=_table("measure", numbers)),
        Section("Statistics", pictures=[("statistics.png", "Joints found, scores, confidences")]),
        Section("Contact sheet", pictures=[("contact.png", contact)], items=captions),
    ]
    if "accuracy" in numbers:
        judged = numbers["accuracy"] | numbers["accuracy"]["pck_0.05_by_joint"]
        sections.append(Section("Against true keypoints", table=_table("measure", judged)))
    made = {name: value for name, value in found.provenance.items() if name != "unreadable"}
    return [*sections, Section("How they were made", table=_table("setting", made))]


def _table(head: str, values: dict) -> list[tuple[str, str]]:
    rows = [(k.replace("_", " "), v) for k, v in values.items() if not isinstance(v, dict)]
    return [(head, "value"), *((name, f"{v:.4g}" if isinstance(v, float) else str(v)) for name, v in rows)]


def judge_keypoints(found: np.ndarray, true: np.ndarray, heights: np.ndarray) -> dict[str, Any]:
    """PCK of all true joints, of those in plain sight (true confidence 1) and of each; median error of the found ones.

    `found` and `true` are [N, 17, 3] in the same pixels, confidence 0 is missing; `heights` [N] are the pictures'.
    """
    distance = errors(found, true)
    near = distance[np.isfinite(distance)]
    return {
        "frames": len(true),
        "pck_0.05": pck(distance, heights),
        "pck_0.05_in_plain_sight": pck(np.where(true[..., 2] == 1, distance, np.nan), heights),
        "median_pixels": float(np.median(near)) if len(near) else None,
        "pck_0.05_by_joint": {name: pck(distance[:, j : j + 1], heights) for j, name in enumerate(KEYPOINT_NAMES)},
    }


def describe(accuracy: dict[str, Any]) -> str:
    """What `judge_keypoints` gives, in a line."""
    every, plain, median = (accuracy[name] for name in ("pck_0.05", "pck_0.05_in_plain_sight", "median_pixels"))
    joints = f"PCK@0.05 of the height {every:.3f} of all true joints, {plain:.3f} of those in plain sight"
    return f"{joints}; median error {float('nan') if median is None else median:.2f} pixels"


def errors(found: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Pixels [N, 17] from each found joint to the true one: infinite if not found, NaN where there is no true one."""
    distance = np.linalg.norm(found[..., :2].astype(np.float64) - true[..., :2], axis=-1)
    distance[found[..., 2] <= 0] = np.inf
    distance[true[..., 2] <= 0] = np.nan
    return distance


def pck(distance: np.ndarray, heights: np.ndarray, share: float = 0.05) -> float:
    """Percentage of correct keypoints, as a share in [0, 1]: joints found within `share` of the pictures' heights [N].

    `distance` is of `errors`: what was not found counts as wrong, what has no truth not at all (NaN if all is so).
    """
    judged = ~np.isnan(distance)
    near = (distance <= share * np.asarray(heights, np.float64)[:, None])[judged]
    return float(near.mean()) if judged.any() else float("nan")
