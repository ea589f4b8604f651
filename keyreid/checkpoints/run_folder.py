"""Where everything of a run lies, and its weights.

RUN/config.yaml                   the resolved configuration
RUN/checkpoints/                  step-NNNNNNNN/, latest, best (see folder.py)
RUN/evaluation/step-NNNNNNNN/     of that checkpoint while training: scores.json, pictures
RUN/evaluation/DATASET-NAME/      of `keyreid evaluate`
RUN/earlier-N/                    what `--resume never` found there
RUN/tracking/, RUN/logs/          the event log and MLflow's run id; what each rank said
"""

from dataclasses import dataclass
from pathlib import Path

from keyreid.checkpoints.folder import checkpoints, named
from keyreid.checkpoints.manifest import EMA, MANIFEST, WEIGHTS, verify
from keyreid.checkpoints.weights_file import check_sha256
from keyreid.errors import CheckpointError
from keyreid.tracking import TRACKING


@dataclass(frozen=True)
class RunFolder:
    """A run on disk, also one that has not begun."""

    path: Path

    @classmethod
    def holding(cls, file: Path) -> "RunFolder | None":
        """The run to which a weights file belongs; None for a file on its own."""
        runs = map(cls, file.resolve().parents[:3])
        return next((run for run in runs if run.config_file.is_file()), None)

    @property
    def config_file(self) -> Path:
        """The configuration with all defaults filled in."""
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        """The folder that holds the checkpoints."""
        return self.path / "checkpoints"

    @property
    def evaluation(self) -> Path:
        """The folder that holds a folder for each evaluation."""
        return self.path / "evaluation"

    @property
    def tracking(self) -> Path:
        """What MLflow gets: see keyreid.tracking."""
        return self.path / TRACKING


def checkpoints_of(location: Path) -> Path:
    """The folder of checkpoints, of a run's folder or of itself."""
    root = RunFolder(location).checkpoints
    return root if root.is_dir() else location


def find_weights(location: str | Path, best: bool = True, averaged: bool | None = None) -> Path:
    """The weights file of a run's folder, its folder of checkpoints, a checkpoint, or the file itself.

    Args:
        best: of a run, the best checkpoint where one is known; False: the newest.
        averaged: of a checkpoint, the averaged weights or the raw ones; None: averaged where there are any.

    Raises:
        CheckpointError: there is none of that kind.
    """
    location = Path(location).expanduser()
    if location.is_file():
        return location
    root = checkpoints_of(location)
    folder = (named(root, "best") if best else None) or named(root, "latest")
    folder = folder or next(reversed(checkpoints(root)), location)
    wanted = [folder / name for name, kind in ((EMA, True), (WEIGHTS, False)) if averaged in (None, kind)]
    if found := next(filter(Path.is_file, wanted), None):
        return found
    if averaged and (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder}: no averaged weights; the run was trained without training.ema_decay")
    raise CheckpointError(f"{location}: no run, checkpoint or weights file")


def check_whole(file: Path) -> None:
    """Compare a weights file with what was written: all files of its checkpoint, or the file's own SHA-256.

    Raises:
        CheckpointError: a byte was altered; names the file.
    """
    if (file.parent / MANIFEST).is_file():
        if faults := verify(file.parent):
            raise CheckpointError(f"{file.parent}: damaged: {'; '.join(faults)}. Take another checkpoint, or a copy")
    elif file.suffix == ".safetensors":
        check_sha256(file)
