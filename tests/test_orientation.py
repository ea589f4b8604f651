"""Orientation tags (EXIF) are applied once, where pictures are read: everything after sees upright pixels."""

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from packed import make_config, pack_dataset
from PIL import Image

from keyreid.datasets import frames, open_dataset
from keyreid.datasets.frames import picture_size, read_frame
from keyreid.datasets.tracklet import Frame
from keyreid.pose.pictures import decode
from keyreid.shards import members, open_reader
from keyreid.shards.plan import evaluation_clips

FORMATS = {
    "jpg": ("JPEG", {"quality": 98, "subsampling": 0}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"lossless": True}),
    "tif": ("TIFF", {}),
    "avif": ("AVIF", {"quality": 95}),
}
# How a camera that held the picture so would have stored an upright one.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def person() -> np.ndarray:
    """uint8 [64, 32, 3], smooth, with no symmetry."""
    rng = np.random.default_rng(0)
    return cv2.resize(rng.integers(0, 255, (4, 2, 3), dtype=np.uint8), (32, 64), interpolation=cv2.INTER_LINEAR)


def store(path: Path, orientation: int) -> Path:
    """Write the person as a camera does that stores its sensor's rows and a tag."""
    kind, options = FORMATS[path.suffix[1:]]
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = Image.fromarray(person())
    picture = picture.transpose(STORED[orientation]) if orientation in STORED else picture
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, kind, exif=exif, **options)
    return path


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_of_every_format_is_read_upright(tmp_path, suffix, orientation):
    path = store(tmp_path / f"a.{suffix}", orientation)
    content, kind = read_frame(Frame(path))
    pictures = [decode(content), members.decode_picture(content)]  # of pose, of shards
    cut, _ = read_frame(Frame(path, (0.0, 0.0, 32.0, 64.0)))
    for picture, exact in zip((*pictures, decode(cut)), ("png webp tif", "png webp tif", "png"), strict=True):
        assert picture.shape == (64, 32, 3)
        assert np.abs(picture.astype(int) - person()).max() <= (0 if suffix in exact.split() else 24)
    np.testing.assert_array_equal(*pictures)
    assert picture_size(path) == (32, 64)
    assert frames.orientation(content) == 1 == Image.open(io.BytesIO(content)).getexif().get(0x0112, 1)
    if orientation == 1 and suffix in ("jpg", "png"):
        assert (content, kind) == (path.read_bytes(), suffix)
    elif suffix != "avif":  # nothing is lost: the pixels are those that the file's own decoder gives, turned
        np.testing.assert_array_equal(pictures[0], frames.decode(path.read_bytes()))


def test_a_tag_behind_the_pixels_of_a_png_counts(tmp_path):
    path = store(tmp_path / "a.png", 6)
    content = path.read_bytes()
    at = content.index(b"eXIf") - 4
    (length,) = struct.unpack(">I", content[at : at + 4])
    chunk, rest = content[at : at + 12 + length], content[:at] + content[at + 12 + length :]
    path.write_bytes(rest[:-12] + chunk + rest[-12:])
    np.testing.assert_array_equal(decode(read_frame(Frame(path))[0]), person())


def test_tags_that_say_nothing_turn_nothing(tmp_path):
    """Orientation 0 and 9, a damaged tag, and the letters of a tag in the pixels."""
    for orientation in (0, 9):
        path = store(tmp_path / "a.jpg", orientation)
        assert read_frame(Frame(path))[0] == path.read_bytes()
    damaged = path.read_bytes().replace(b"MM\0*", b"MM\0+").replace(b"II*\0", b"II+\0")
    path.write_bytes(damaged)
    assert read_frame(Frame(path))[0] == damaged
    pixels = np.frombuffer(b"Exif" * 12, np.uint8).reshape(4, 4, 3)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    packed = zlib.compressobj(0)
    chunks = members.png_chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0))
    chunks += members.png_chunk(b"IDAT", packed.compress(rows) + packed.flush()) + members.png_chunk(b"IEND", b"")
    (tmp_path / "b.png").write_bytes(frames.PNG + chunks)
    assert read_frame(Frame(tmp_path / "b.png"))[0] == frames.PNG + chunks


def test_boxes_are_in_the_upright_picture(tmp_path):
    path = store(tmp_path / "a.png", 6)
    inside = decode(read_frame(Frame(path, (4.0, 40.0, 20.0, 16.0)))[0])
    np.testing.assert_array_equal(inside, person()[40:56, 4:24])


@pytest.mark.parametrize("reader", ["plain", "dali"])
def test_readers_deliver_what_pose_sees(tmp_path, reader):
    if reader == "dali":
        pytest.importorskip("nvidia.dali")
    for orientation in range(1, 9):
        store(tmp_path / f"own/cam/ada/1/{orientation}.{'jpg' if orientation % 2 else 'png'}", orientation)
    dataset = open_dataset("folder", tmp_path / "own")
    shards = pack_dataset(dataset, tmp_path / "own", tmp_path / "shards")
    assert (shards.index.sizes(slice(None)) == (32, 64)).all()
    config = make_config(tmp_path / "shards", data__reader=reader)
    clips = evaluation_clips(shards, [0], 4)
    batches = open_reader(shards, iter([clips]), config, workers=1)
    delivered = next(batches).images.numpy()
    batches.close()
    seen = np.stack([decode(read_frame(frame)[0]) for frame in dataset.tracklets[0].frames])
    difference = delivered.reshape(-1, 3, 64, 32).transpose(0, 2, 3, 1).astype(int) - seen
    assert np.abs(difference).max() <= (3 if reader == "dali" else 0)  # DALI has its own JPEG decoder


def test_a_sideways_picture_in_shards_of_an_earlier_version_is_found(tmp_path):
    content = store(tmp_path / "a.jpg", 6).read_bytes()
    with pytest.raises(ValueError, match=r"stored sideways .EXIF orientation 6.; pack the dataset again"):
        members.check_picture(content)
    assert members.check_picture(store(tmp_path / "a.jpg", 1).read_bytes())
