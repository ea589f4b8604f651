"""Damaged pictures, headers that lie and bombs are named, by file and sample; no decoder says it in its own words."""

import os
import struct
import threading
import time
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packed import make_dataset, pack_dataset
from PIL import Image

from keyreid.datasets import frames, open_dataset
from keyreid.datasets.frames import MAX_PIXELS, picture_size, read_frame
from keyreid.datasets.tracklet import Dataset, Frame
from keyreid.errors import ConfigError, DataError, KeyreidError
from keyreid.pose import pictures
from keyreid.shards import members
from keyreid.shards.members import png_chunk

WIDTH, HEIGHT = 64, 128
PIXELS = cv2.resize(np.random.default_rng(0).integers(0, 255, (32, 16, 3), dtype=np.uint8), (WIDTH, HEIGHT))
JPEG = cv2.imencode(".jpg", PIXELS)[1].tobytes()
FRAME_HEADER = JPEG.index(b"\xff\xc0")


def jpeg_of(width: int, height: int) -> bytes:
    """The JPEG, whose header says another size."""
    return JPEG[: FRAME_HEADER + 5] + struct.pack(">HH", height, width) + JPEG[FRAME_HEADER + 9 :]


def png_of(width: int, height: int) -> bytes:
    """A PNG of the pixels, whose header says another size."""
    rows = b"".join(b"\0" + row.tobytes() for row in PIXELS)
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return frames.PNG + header + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")


PNG = png_of(WIDTH, HEIGHT)
HALF = len(JPEG) // 2
DAMAGED = {
    "cut.jpg": JPEG[:HALF],
    "cut, with an end.jpg": JPEG[:HALF] + b"\xff\xd9",
    "hole.jpg": JPEG[:HALF] + JPEG[HALF + 200 :],
    "taller.jpg": jpeg_of(WIDTH, 4 * HEIGHT),
    "shorter.jpg": jpeg_of(WIDTH, HEIGHT // 2),
    "narrower.jpg": jpeg_of(WIDTH // 2, HEIGHT),
    "cut.png": PNG[: len(PNG) // 2],
    "no end.png": PNG[:-12],
    "flipped.png": PNG[:200] + bytes([PNG[200] ^ 1]) + PNG[201:],
    "taller.png": png_of(WIDTH, 4 * HEIGHT),
    "shorter.png": png_of(WIDTH, HEIGHT // 2),
    "narrower.png": png_of(WIDTH // 2, HEIGHT),
    **{f"cut{suffix}": (lambda whole: whole[: len(whole) // 2])(cv2.imencode(suffix, PIXELS)[1].tobytes())
       for suffix in (".bmp", ".webp", ".tif", ".gif", ".avif")},
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named_by_file_and_sample(tmp_path, name, capfd):
    path = tmp_path / name
    path.write_bytes(DAMAGED[name])
    whole = make_dataset(tmp_path / "source", identities=1, tracklets=1, frames=(2, 2))
    tracklet = replace(whole.tracklets[0], frames=(whole.tracklets[0].frames[0], Frame(path)))
    capfd.readouterr()
    with pytest.raises(DataError, match=rf"{name}: .*tracklet {tracklet.key}"):
        pack_dataset(Dataset("toy", (tracklet,)), tmp_path, tmp_path / "out")
    with pytest.raises(DataError, match=rf"{name}"):
        read_frame(Frame(path, (0.0, 0.0, 16.0, 16.0)))
    with pytest.raises(ValueError):  # verifying
        members.check_picture(path.read_bytes())
    with pytest.raises(DataError):  # pose
        pictures.decode(path.read_bytes())
    assert capfd.readouterr().err == ""


def test_whole_pictures_and_harmless_oddities_pass():
    """Bytes behind the end, and the byte too many before it that some cameras write."""
    for content in (JPEG, PNG, JPEG + bytes(300), JPEG[:-2] + bytes(2) + JPEG[-2:]):
        assert members.check_picture(content) is content
        assert frames.decode(content).shape == (HEIGHT, WIDTH, 3)


def bombs() -> dict[str, bytes]:
    """Headers of 60,000 x 60,000 pixels with next to nothing behind them."""
    made = {"bomb.jpg": jpeg_of(60000, 60000), "bomb.png": png_of(60000, 60000)}
    bmp = bytearray(cv2.imencode(".bmp", PIXELS)[1].tobytes())
    bmp[18:26] = struct.pack("<ii", 60000, 60000)
    gif = bytearray(cv2.imencode(".gif", PIXELS)[1].tobytes())
    gif[6:10] = struct.pack("<HH", 60000, 60000)
    return made | {"bomb.bmp": bytes(bmp), "bomb.gif": bytes(gif)}


@pytest.mark.parametrize("name", bombs())
def test_bombs_are_refused_before_they_grow(tmp_path, name, capfd):
    path = tmp_path / name
    path.write_bytes(bombs()[name])
    for open_it in (picture_size, lambda path: read_frame(Frame(path, (0.0, 0.0, 9.0, 9.0)))):
        with pytest.raises(DataError, match=rf"{name}: holds more pixels than {MAX_PIXELS} allows"):
            open_it(path)
    with pytest.raises(ValueError, match=MAX_PIXELS):
        members.check_picture(path.read_bytes())
    assert capfd.readouterr().err == ""


def test_the_limit_can_be_changed(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    path.write_bytes(JPEG)
    monkeypatch.setenv(MAX_PIXELS, str(WIDTH * HEIGHT))
    assert picture_size(path) == (WIDTH, HEIGHT)
    monkeypatch.setenv(MAX_PIXELS, str(WIDTH * HEIGHT - 1))
    with pytest.raises(DataError, match=f"a.jpg.*{MAX_PIXELS}"):
        picture_size(path)
    writer = cv2.VideoWriter(str(tmp_path / "a.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 25, (160, 120))
    writer.write(np.zeros((120, 160, 3), np.uint8))
    writer.release()
    with pytest.raises(DataError, match=rf"a\.avi: frames of 160 x 120 pixels; {MAX_PIXELS}"):
        read_frame(Frame(tmp_path / "a.avi", None, 0))
    monkeypatch.setenv(MAX_PIXELS, "300000000")
    huge = np.zeros((1, 1), np.uint8)  # more than Pillow bears by itself, but not than asked for
    header = cv2.imencode(".png", huge)[1].tobytes()
    header = frames.PNG + png_chunk(b"IHDR", struct.pack(">II", 15000, 15000) + header[24:29]) + header[33:]
    assert frames.picture_header(header)[:2] == (15000, 15000)
    for wrong in ("many", "0", "-5", "1e6", "9999999999", ""):
        monkeypatch.setenv(MAX_PIXELS, wrong)
        with pytest.raises(ConfigError, match=MAX_PIXELS):
            picture_size(path)


def test_words_of_others_are_passed_on(capfd):
    """While one thread listens for damage, what others say still reaches the terminal.

    All but what is written in the instant in which listening ends: a line or two of hundreds on a busy machine.
    """
    said = [f"line {number}\n" for number in range(200)]

    def talk() -> None:
        for line in said:
            os.write(2, line.encode())
            time.sleep(1e-4)

    talker = threading.Thread(target=talk)
    talker.start()
    while talker.is_alive():
        frames.decode(JPEG)
        with pytest.raises(ValueError):
            frames.decode(DAMAGED["taller.jpg"])
    talker.join()
    heard = capfd.readouterr().err.splitlines(keepends=True)
    assert set(heard) <= set(said)
    assert len(said) - 10 <= len(set(heard)) == len(heard)


def test_every_suffix_is_read_or_named(tmp_path, caplog):
    folder = tmp_path / "cam" / "ada" / "1"
    folder.mkdir(parents=True)
    for number, suffix in enumerate(("jpg", "jfif", "jpe", "jpeg", "png", "bmp", "webp", "tif", "tiff", "gif", "avif")):
        kind = {"jfif": "jpg", "jpe": "jpg"}.get(suffix, suffix)
        content = cv2.imencode(f".{kind}", PIXELS)[1].tobytes()
        (folder / f"{number:02d}.{suffix.upper() if number % 2 else suffix}").write_bytes(content)
    for name in ("x.heic", "y.heic", "z.raw", "notes.txt"):
        (folder / name).write_bytes(b"?")
    dataset = open_dataset("folder", tmp_path)
    assert len(dataset.tracklets[0].frames) == 11
    for frame in dataset.tracklets[0].frames:
        difference = pictures.decode(read_frame(frame)[0])[..., ::-1].astype(int) - PIXELS
        assert np.abs(difference).mean() < 20, frame.path
    (line,) = [record.getMessage() for record in caplog.records]
    assert "2 .heic, 1 .raw" in line and "x.heic" in line
    caplog.clear()
    open_dataset("folder", make_own(tmp_path / "other"))
    assert not caplog.records  # nothing of an earlier data set is said again


def make_own(root: Path) -> Path:
    (root / "cam" / "ada" / "1").mkdir(parents=True)
    (root / "cam" / "ada" / "1" / "0.jpg").write_bytes(JPEG)
    return root


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_pictures_that_move_are_no_frame(tmp_path, suffix):
    stills = [Image.fromarray(np.full((20, 10, 3), value, np.uint8)) for value in (0, 120, 240)]
    stills[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=stills[1:])
    with pytest.raises(DataError, match=f"a.{suffix}: holds several pictures"):
        pictures_of = read_frame(Frame(tmp_path / f"a.{suffix}"))[0]
        members.check_picture(pictures_of) if suffix != "png" else read_frame(
            Frame(tmp_path / f"a.{suffix}", (0.0, 0.0, 5.0, 5.0))
        )


SEEDS = [JPEG, PNG, *(cv2.imencode(suffix, PIXELS)[1].tobytes() for suffix in (".bmp", ".webp", ".tif", ".gif"))]


def survive(seed: bytes, changes: list[tuple[int, bytes]], length: int) -> None:
    content = bytearray(seed)
    for at, change in changes:
        at %= len(content)
        content[at : at + len(change)] = change
    content = bytes(content[: length if length else None])
    for read in (frames.decode, members.check_picture, frames.picture_header):
        try:
            read(content)
        except (ValueError, KeyreidError) as error:
            assert str(error)


CHANGED = given(
    st.sampled_from(SEEDS),
    st.lists(st.tuples(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=4)), max_size=4),
    st.integers(0, 2000),
)


@CHANGED
def test_any_bytes_are_a_picture_or_an_error(seed, changes, length):
    survive(seed, changes, length)
