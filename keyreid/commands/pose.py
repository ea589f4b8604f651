"""`keyreid pose` and its companions: keypoints of a dataset, their quality, imports and exports, the small network."""

import contextlib
from pathlib import Path
from typing import Annotated, Literal

import typer

from keyreid.commands.options import DatasetName, ReaderOptions, Root, Share, parse_share
from keyreid.datasets import open_dataset, parse_options
from keyreid.ownership import owned
from keyreid.plain_text import say

KeypointType = Annotated[
    Literal["float32", "float16"], typer.Option(help="type of stored keypoints; float16 moves 6 % of joints by a pixel")
]
Kind = Annotated[Literal["pose", "npy"], typer.Option(help="keypoints (.pose) or heatmaps (.npy, 1.6 MB a frame)")]
Out = Annotated[Path, typer.Option(help="folder for the files, one per tracklet; `pose` keeps existing ones")]
Weights = Annotated[Path, typer.Argument(help="weights file to write (.safetensors)")]
Trust = Annotated[
    bool, typer.Option(help="trust a pickled checkpoint, which may run code when loaded; weights files do not need it")
]


def pose(
    dataset: DatasetName,
    root: Root,
    out: Out,
    checkpoint: Annotated[
        str,
        typer.Option(
            help="walkers (comes with keyreid, for rendered walkers only), a weights file, or a checkpoint that "
            "OpenPifPaf publishes: shufflenetv2k16, shufflenetv2k30, resnet50, ... (downloaded once)"
        ),
    ] = "walkers",
    trust: Trust = False,
    device: Annotated[
        str, typer.Option(help="auto: every visible GPU, else the CPU; or a list, one process each: cuda:0,cuda:1")
    ] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="frames per batch, all from one tracklet")] = 32,
    workers: Annotated[int, typer.Option(min=0, help="reading processes per device")] = 2,
    long_edge: Annotated[
        int | None, typer.Option(min=17, help="pixels to resize frames to; default: 128 for walkers, else no resizing")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="joints below it are missing; default: OpenPifPaf's 0.15")
    ] = None,
    select: Annotated[
        Literal["score", "centre"], typer.Option(help="of several people: the best score, or the nearest to the middle")
    ] = "score",
    dtype: KeypointType = "float32",
    share: Share = "0/1",
    max_unreadable: Annotated[int, typer.Option(min=0, help="unreadable frames allowed before the run stops")] = 100,
    option: ReaderOptions = None,
) -> None:
    """Find the keypoints of every frame with OpenPifPaf (install it with launch/install-pose).

    Run it again after an interruption: finished tracklets are kept. The files do not depend on how often it was stopped
    or how the work was shared.
    """
    from keyreid.pose.estimate import PoseSettings, PoseWork, estimate, parse_devices

    settings = PoseSettings(checkpoint, long_edge, threshold, select, dtype)
    work = PoseWork(batch_size, workers, parse_devices(device), trust, max_unreadable)
    data = open_dataset(dataset, root, **parse_options(option or []))
    part = parse_share(share)
    with owned(out, "keyreid pose") if part[1] == 1 else contextlib.nullcontext():
        summary = estimate(data, out, settings, work, part)
    for fault in summary.unreadable:
        say(f"not read: {fault}", err=True)
    typer.echo(f"{out}: {summary}")


def pose_report(
    dataset: DatasetName,
    root: Root,
    keypoints: Annotated[Path, typer.Argument(help="folder of keypoint files")],
    out: Annotated[Path | None, typer.Option(help="folder of the report; default: KEYPOINTS/report")] = None,
    samples: Annotated[int, typer.Option(min=2, help="crops on the contact sheet")] = 24,
    truth: Annotated[Path | None, typer.Option(help="true keypoint files, for example walkers' keypoints")] = None,
    option: ReaderOptions = None,
) -> None:
    """Report how good keypoints are: joints found, confidences, a contact sheet; PCK if the truth is known."""
    from keyreid.pose.quality import describe, write_quality

    out = out or keypoints / "report"
    data = open_dataset(dataset, root, **parse_options(option or []))
    numbers = write_quality(data, keypoints, out, samples, truth)
    found = f"a person in {numbers['frames_with_person']:.1%} of {numbers['frames']} frames"
    typer.echo(f"{out}/report.html: {found}, {numbers['joints_a_frame']:.1f} joints each")
    if accuracy := numbers.get("accuracy"):
        typer.echo(describe(accuracy))


def pose_import(
    dataset: DatasetName,
    root: Root,
    tree: Annotated[Path, typer.Argument(help="folder that mirrors ROOT's, with one .pose or .npy per picture")],
    out: Out,
    kind: Kind = "pose",
    dtype: Annotated[
        Literal["float16", "float32", "float64"] | None,
        typer.Option(help="type to store; default: float32 for keypoints, the files' own for heatmaps"),
    ] = None,
    max_missing: Annotated[int, typer.Option(min=0, help="allowed pictures without a file; they get zeros")] = 0,
    option: ReaderOptions = None,
) -> None:
    """Read the published pipeline's files: one .pose (JSON) or .npy (heatmaps) for each picture."""
    from keyreid.pose import imports

    data = open_dataset(dataset, root, **parse_options(option or []))
    read = imports.import_poses if kind == "pose" else imports.import_heatmaps
    with owned(out, "keyreid pose-import"):
        moved = read(data, root.expanduser(), tree, out, dtype, max_missing)
    missing = f"{len(moved.missing)} of them without a file"
    typer.echo(f"{out}: {moved.tracklets} tracklets, {moved.frames} frames, {missing}")


def pose_export(
    dataset: DatasetName,
    root: Root,
    files: Annotated[Path, typer.Argument(help="folder of keypoint files, or of imported heatmaps")],
    tree: Annotated[Path, typer.Argument(help="folder to write, one file per picture")],
    kind: Kind = "pose",
    option: ReaderOptions = None,
) -> None:
    """Write the published pipeline's files: one .pose (JSON) or .npy (heatmaps) for each picture."""
    from keyreid.pose import imports

    data = open_dataset(dataset, root, **parse_options(option or []))
    with owned(tree, "keyreid pose-export"):
        moved = imports.export_tree(data, root.expanduser(), files, tree, kind)
    typer.echo(f"{tree}: {moved.frames} .{kind} files of {moved.tracklets} tracklets")


def pose_convert(
    checkpoint: Annotated[str, typer.Argument(help="an OpenPifPaf checkpoint: a file, or the name of a published one")],
    out: Weights,
    trust: Trust = False,
) -> None:
    """Convert an OpenPifPaf checkpoint into a weights file, which contains no code."""
    from keyreid.pose import pifpaf

    pifpaf.check_weights_name(out)
    network, sha256 = pifpaf.load_network(checkpoint, trust)
    pifpaf.save_weights(network, out)
    typer.echo(f"{out}: the weights of {checkpoint} (SHA-256 {sha256})")


def pose_train(
    out: Weights,
    pictures: Annotated[int, typer.Option(min=16, help="pictures rendered for training")] = 4800,
    epochs: Annotated[int, typer.Option(min=1)] = 8,
    seed: Annotated[int, typer.Option(help="seed of the pictures and the training")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    processes: Annotated[int, typer.Option(min=1, help="processes that render")] = 2,
) -> None:
    """Train the small pose network for rendered walkers, and evaluate it on held-out ones."""
    from keyreid.pose.quality import describe
    from keyreid.synthetic.pose_training import TrainingSettings, train

    settings = TrainingSettings(pictures, epochs, seed=seed)
    for height, accuracy in train(out, settings, device, processes).items():
        typer.echo(f"held-out walkers of {height} pixels: {describe(accuracy)}")
