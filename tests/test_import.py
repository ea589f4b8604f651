"""Videos, folders and tables become an imported folder: what is kept, what it is called, and what follows reads it."""

import json
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from training_runs import run, toy_config, train
from typer.testing import CliRunner

from keyreid import ownership
from keyreid.checkpoints.trained import find_weights
from keyreid.checkpoints.weights_file import read_header
from keyreid.cli import app
from keyreid.datasets import open_dataset
from keyreid.datasets.folder import read_import_card
from keyreid.datasets.frames import read_frame
from keyreid.errors import DataError
from keyreid.ingest.folder import import_folder
from keyreid.ingest.video import VideoSettings, import_video
from keyreid.shards.members import decode_picture

COLOURS = {7: (200, 40, 40), 9: (40, 200, 40), 12: (40, 40, 200)}  # RGB of each track
SIZE = 200, 160  # width and height of the video
FRAMES = 12


def box_of(track: int, frame: int) -> tuple[int, int, int, int]:
    """x, y, width, height: people of 24 x 60 pixels walk to the right."""
    return 10 + 60 * list(COLOURS).index(track) + 2 * frame, 40, 24, 60


def make_video(path) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5.0, SIZE)
    for frame in range(FRAMES):
        picture = np.full((SIZE[1], SIZE[0], 3), 128, np.uint8)
        for track, colour in COLOURS.items():
            x, y, width, height = box_of(track, frame)
            picture[y : y + height, x : x + width] = colour[::-1]
        writer.write(picture)
    writer.release()


def make_tracks(path, header: bool = False, rows=None) -> None:
    lines = ["frame,id,left,top,w,h,score"] if header else []
    for track in COLOURS:
        for frame in range(FRAMES):
            x, y, width, height = box_of(track, frame)
            lines.append(f"{frame + 1},{track},{x},{y},{width},{height},1")
    path.write_text("\n".join(lines + (rows or [])) + "\n")


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recording")
    make_video(folder / "yard.avi")
    make_tracks(folder / "yard.txt")
    return folder


SMALL = VideoSettings(min_width=10, min_height=20, padding=0.0)


def test_each_picture_shows_its_track(recording, tmp_path):
    result = import_video(recording / "yard.avi", tmp_path / "people", recording / "yard.txt", "Yard", SMALL)
    assert (result.tracklets, result.pictures, result.cameras) == (3, 36, ["Yard"])
    data = open_dataset("folder", tmp_path / "people")
    assert data.names["camera"] == {"Yard": 1} and data.frames_per_second == {"Yard": 5.0}
    for tracklet in data.tracklets:
        track = int(re.fullmatch(r"yard-(\d+)_0", tracklet.key)[1])
        assert tracklet.identity is None and tracklet.split == "all"
        assert [frame.path.stem for frame in tracklet.frames] == [f"{n:06d}" for n in range(FRAMES)]
        for frame in tracklet.frames:
            picture = decode_picture(read_frame(frame)[0])
            assert picture.shape == (60, 24, 3)
            assert np.abs(picture[5:-5, 5:-5].reshape(-1, 3).mean(0) - COLOURS[track]).max() < 6


def test_padding_grows_the_box_and_stays_in_the_picture(recording, tmp_path):
    settings = VideoSettings(min_width=10, min_height=20, padding=0.5)
    import_video(recording / "yard.avi", tmp_path, recording / "yard.txt", settings=settings)
    tracklets = open_dataset("folder", tmp_path).tracklets
    heights, widths = np.array([decode_picture(read_frame(t.frames[0])[0]).shape[:2] for t in tracklets]).T
    assert set(heights) == {120} and sorted(widths) == [46, 48, 48]  # the first is cut by the picture's border


def test_bounds_cut_gaps_and_thinning(recording, tmp_path):
    rows = [f"{frame},50,100,20,20,50,1" for frame in (1, 2, 3, 9, 10)]  # a gap
    rows += [f"{frame},51,100,20,8,16,1" for frame in range(1, 9)]  # too small
    rows += [f"{frame},52,-30,20,40,50,1" for frame in range(1, 9)]  # mostly outside
    rows += [f"{frame},53,100,20,20,50,0.2" for frame in range(1, 9)]  # not confident
    rows += [f"{frame},54,100,20,20,50,1" for frame in (1, 2)]  # too short
    make_tracks(tmp_path / "tracks.txt", rows=rows)
    settings = VideoSettings(min_width=10, min_height=20, padding=0, min_length=4, min_confidence=0.5, max_frames=6)
    result = import_video(recording / "yard.avi", tmp_path / "out", tmp_path / "tracks.txt", "A", settings)
    assert result.left_out == {"boxes mostly outside the picture": 8}
    numbers = {t.key: [int(f.path.stem) for f in t.frames] for t in open_dataset("folder", tmp_path / "out").tracklets}
    assert numbers["yard-50_0"] == [0, 1, 2] and numbers["yard-50_1"] == [8, 9]
    assert numbers["yard-7_0"] == [*range(6)] and numbers["yard-7_1"] == [*range(6, 12)]
    assert len(numbers) == 8 and not any(key.startswith(("yard-51", "yard-53", "yard-54")) for key in numbers)

    thin = VideoSettings(min_width=10, min_height=20, every=3)
    import_video(recording / "yard.avi", tmp_path / "thin", recording / "yard.txt", settings=thin)
    tracklet = open_dataset("folder", tmp_path / "thin").tracklets[0]
    assert [int(frame.path.stem) for frame in tracklet.frames] == [0, 3, 6, 9]


def test_sources_add_up_and_names_keep_their_numbers(recording, tmp_path):
    out = tmp_path / "people"
    make_tracks(tmp_path / "own.csv", header=True)  # another order of names, no class, no visibility
    people = VideoSettings(min_width=10, min_height=20, identity="person")
    import_video(recording / "yard.avi", out, recording / "yard.txt", "Yard", people)
    first = read_import_card(out).names
    import_video(recording / "yard.avi", out, tmp_path / "own.csv", "Attic", people, name="attic")
    data = open_dataset("folder", out)
    assert data.names["camera"] == {"Yard": 1, "Attic": 2}  # not in natural order: Yard was there first
    assert data.names["identity"] == first["identity"] == {"7": 1, "9": 2, "12": 3}
    assert len(data.tracklets) == 6 and {t.identity for t in data.tracklets} == {1, 2, 3}  # the same people at both

    again = import_video(recording / "yard.avi", out, recording / "yard.txt", "Yard", people)
    assert again.tracklets == 3 and len(open_dataset("folder", out).tracklets) == 6  # replaced, not doubled

    track = VideoSettings(min_width=10, min_height=20, identity="track")
    import_video(recording / "yard.avi", tmp_path / "tracks", recording / "yard.txt", "Yard", track)
    assert list(open_dataset("folder", tmp_path / "tracks").names["identity"]) == ["Yard/7", "Yard/9", "Yard/12"]


def test_what_cannot_be_imported_says_why(recording, tmp_path):
    with pytest.raises(DataError, match="no box of the tracks is left"):
        import_video(
            recording / "yard.avi", tmp_path / "a", recording / "yard.txt", settings=VideoSettings(min_height=90)
        )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not an imported folder"):
        import_video(recording / "yard.avi", tmp_path / "full", recording / "yard.txt")
    (tmp_path / "det.txt").write_text("1,-1,10,10,20,40,0.9\n")
    with pytest.raises(DataError, match="detections, not tracks"):
        import_video(recording / "yard.avi", tmp_path / "b", tmp_path / "det.txt")
    make_tracks(tmp_path / "long.txt", rows=["99,7,10,40,24,60,1"])
    with pytest.raises(DataError, match="ends after 12"):
        import_video(recording / "yard.avi", tmp_path / "c", tmp_path / "long.txt", settings=SMALL)
    assert not (tmp_path / "c" / "manifest.parquet").exists()


def make_table(folder, people: int = 8):
    """Pictures of unequal sizes and kinds, of people with names, and a table of them; some nameless."""
    rng = np.random.default_rng(0)
    rows = []
    for person in range(people):
        colour = rng.integers(0, 256, 3)
        for camera in ("hall/north", "Straße 5"):
            for picture in range(5):
                size = int(rng.integers(20, 60)), int(rng.integers(50, 150))
                pixels = np.clip(colour + rng.integers(-30, 30, (size[1], size[0], 3)), 0, 255).astype(np.uint8)
                path = folder / f"{person}-{len(rows)}{('.jpg', '.png', '.webp')[picture % 3]}"
                Image.fromarray(pixels).save(path)
                rows.append((path.name, camera, f"person {chr(65 + person)}", picture))
    table = pd.DataFrame(rows, columns=["path", "camera", "identity", "frame"])
    table.to_csv(folder / "people.csv", index=False)
    return table


def test_a_table_with_names_keeps_them(tmp_path):
    make_table(tmp_path, people=6)
    result = import_folder(tmp_path / "people.csv", tmp_path / "out", test_share=0.5, min_length=3)
    assert (result.tracklets, result.pictures) == (12, 60)
    data = open_dataset("folder", tmp_path / "out")
    assert data.names["identity"] == {f"person {letter}": n for n, letter in enumerate("ABCDEF", start=1)}
    assert data.names["camera"] == {"Straße 5": 1, "hall/north": 2}  # capitals first
    by_split = pd.Series([t.split for t in data.tracklets]).value_counts().to_dict()
    assert by_split == {"train": 6, "query": 3, "gallery": 3}
    small = import_folder(tmp_path / "people.csv", tmp_path / "tall", min_height=100, min_length=2)
    assert 0 < small.pictures < 60 and small.left_out["pictures too small"] > 0
    for tracklet in open_dataset("folder", tmp_path / "tall").tracklets:
        assert len(tracklet.frames) >= 2
        for frame in tracklet.frames:
            with Image.open(frame.path) as picture:
                assert picture.height >= 100


@pytest.mark.slow
def test_a_table_with_names_and_unequal_pictures_trains_and_evaluates(tmp_path):
    make_table(tmp_path)
    for words in (
        ["import", "folder", tmp_path / "people.csv", "--out", tmp_path / "people", "--test-share", "0.5"],
        ["shard", "folder", tmp_path / "people", "--out", tmp_path / "shards", "--processes", "1"],
    ):
        result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
    config = toy_config(tmp_path / "shards", tmp_path / "runs", schedule={"epochs": 1, "warmup_epochs": 0})
    run(train, config)
    scores = json.loads((config.run_dir / "result.json").read_text())
    # Each of 4 test persons: first tracklet of the first camera asks, that of the other is to be found.
    assert (scores["queries"], scores["valid_queries"], scores["gallery"], scores["protocol"]) == (4, 4, 4, "torchreid")
    assert 0.25 <= scores["mAP"] <= 1
    assert read_header(find_weights(config.run_dir)).identities == sorted(
        {t.identity for t in open_dataset("folder", tmp_path / "people").tracklets if t.split == "train"}
    )


def test_an_import_waits_for_the_folders_owner(recording, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(ownership, "PATIENCE_SECONDS", 0.2)
    out = tmp_path / "people"
    with ThreadPoolExecutor(1) as pool:
        with ownership.owned(out, "keyreid import"):
            waiting = pool.submit(import_video, recording / "yard.avi", out, recording / "yard.txt", "Yard", SMALL)
            time.sleep(0.5)
            assert not waiting.done() and not (out / "crops").exists()
        assert waiting.result().tracklets == 3
    assert "keyreid import (pid" in capfd.readouterr().err


@pytest.mark.slow
def test_four_imports_at_once_are_all_kept(recording, tmp_path):
    command = [
        sys.executable,
        "-m",
        "keyreid.cli",
        "import",
        "video",
        recording / "yard.avi",
        "--out",
        tmp_path / "people",
    ]
    command += ["--tracks", recording / "yard.txt", "--min-width", "10", "--min-height", "20"]
    running = [
        subprocess.Popen([*map(str, command), "--camera", camera, "--name", f"from-{camera}"], stderr=subprocess.PIPE)
        for camera in "ABCD"
    ]
    for process in running:
        assert process.wait() == 0, process.stderr.read()
    assert set(pd.read_parquet(tmp_path / "people" / "manifest.parquet").camera) == set("ABCD")
    card = read_import_card(tmp_path / "people")
    assert set(card.sources) == {f"from-{camera}" for camera in "ABCD"} and sorted(card.names["camera"].values()) == [
        *range(1, 5)
    ]
    assert {path.name for path in (tmp_path / "people").iterdir()} == {"crops", "imported.json", "manifest.parquet"}


def test_another_file_of_a_name_does_not_replace_the_first(recording, tmp_path):
    (tmp_path / "gate").mkdir()
    shutil.copy(recording / "yard.avi", tmp_path / "gate" / "yard.avi")
    out = tmp_path / "people"
    import_video(recording / "yard.avi", out, recording / "yard.txt", "Yard", SMALL)
    with pytest.raises(DataError, match=r"yard is .*yard.avi; --name OTHER adds .*gate/yard.avi, --name yard replaces"):
        import_video(tmp_path / "gate" / "yard.avi", out, recording / "yard.txt", "Gate", SMALL)
    import_video(tmp_path / "gate" / "yard.avi", out, recording / "yard.txt", "Gate", SMALL, name="gate")
    assert open_dataset("folder", out).names["camera"] == {"Yard": 1, "Gate": 2}
    for name in ("..", "../elsewhere", "a/b", "", "x" * 40, "ä"):
        with pytest.raises(DataError, match="--name"):
            import_video(recording / "yard.avi", out, recording / "yard.txt", "Yard", SMALL, name=name)


def test_tracks_and_pictures_of_like_names_are_all_cut(tmp_path):
    """Ids that are one in letters, and pictures whose names hold no number or the same one."""
    (tmp_path / "street").mkdir()
    for number, name in enumerate(("a1.png", "b1.png", "c①.png", "d².png")):
        Image.new("L", SIZE, 60 * number).save(tmp_path / "street" / name)
    lines = [f"{frame},{track},20,20,40,80" for track in ("a.b", "a-b", "A-B") for frame in range(1, 5)]
    (tmp_path / "tracks.csv").write_text("\n".join(["frame,id,x,y,w,h", *lines]))
    import_video(tmp_path / "street", tmp_path / "out", tmp_path / "tracks.csv", settings=SMALL)
    data = open_dataset("folder", tmp_path / "out")
    assert [len(tracklet.frames) for tracklet in data.tracklets] == [4, 4, 4]
    assert len({frame.path for tracklet in data.tracklets for frame in tracklet.frames}) == 12
    shades = [decode_picture(read_frame(frame)[0]).mean() for frame in data.tracklets[0].frames]
    np.testing.assert_allclose(shades, [0, 60, 120, 180], atol=3)


def test_an_imported_folder_of_an_earlier_version_keeps_its_numbers(tmp_path):
    make_table(tmp_path, people=2)
    import_folder(tmp_path / "people.csv", tmp_path / "out")
    path = tmp_path / "out" / "imported.json"
    card = json.loads(path.read_text())
    decomposed = {"Stra\u00dfe 5": 2, "hall/north": 1}
    card["names"] = {"identity": {"person A": 5, "person B": 3, "Zoe\u0308": 9, "7.0": 8, "7": 6}, "camera": decomposed}
    path.write_text(json.dumps(card))
    assert read_import_card(tmp_path / "out").names["identity"] == {"Zoë": 9, "7": 6, "person A": 5, "person B": 3}
    assert open_dataset("folder", tmp_path / "out").names["identity"] == {"person A": 5, "person B": 3}
    card["names"]["camera"]["lift"] = 2
    path.write_text(json.dumps(card))
    with pytest.raises(DataError, match="two have one number"):
        open_dataset("folder", tmp_path / "out")
