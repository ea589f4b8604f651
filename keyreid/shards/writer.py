"""Write one shard: a tar of whole tracklets and the index beside it, both there whole or not at all.

Bytes depend on nothing but the tracklets and the settings: headers hold no time, user or host. A shard is finished
when its index exists, because the index is renamed into place last; `kept` says whether a finished shard is the one
that would be written again.
"""

import hashlib
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from webdataset import TarWriter

from keyreid.datasets import frames as source
from keyreid.datasets.tracklet import Frame, Tracklet
from keyreid.errors import DataError, KeyreidError
from keyreid.files import replace_bytes, replacing, sha256, sync, writing
from keyreid.pose import heatmap_files, keypoint_files
from keyreid.pose.heatmaps import TILE_HEIGHT, TILE_WIDTH, check_heatmaps, render_tiles, visibility
from keyreid.pose.parts import part_names
from keyreid.shards import members
from keyreid.shards.index_file import TAR_BLOCK, ShardIndex, encode_index, index_path, read_index
from keyreid.shards.members import VERSION


@dataclass(frozen=True)
class PackSettings:
    """What decides the content of shards, apart from the tracklets.

    Keypoints come from a folder of keypoint files `KEY.npz`, or are the tracklets' own, zeros where they have none.
    Heatmaps come from a folder of heatmap files or of published ones, float [6, H, W], named as the frames with `.npy`,
    or are rendered from the keypoints.
    """

    root: Path  # the dataset's folder; sources are named relative to it
    keypoints: Path | None = None
    heatmaps: Path | None = None
    image: str = "keep"  # JPEG and PNG byte for byte; `jpeg` makes JPEG of everything that is none
    quality: int = 95  # of JPEGs that are made
    parts: int = 6
    order: int | None = None  # the seed of an order of identities, see layout.py; none: the dataset's order
    dataset: str = ""  # with `options`: what `keyreid.datasets.open_dataset` was given; the card notes them
    options: dict[str, Any] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """The settings as they stand in the dataset card: no path of this machine in them."""
        keypoints = "keypoint files" if self.keypoints else "the dataset's keypoints"
        image = {"image": self.image} | ({"quality": self.quality} if self.image == "jpeg" else {})
        origin = "heatmap files" if self.heatmaps else keypoints
        heatmaps = {"from": origin, "parts": list(part_names(self.parts)), "tile": [TILE_HEIGHT, TILE_WIDTH]}
        order = {} if self.order is None else {"order": self.order}
        return {**image, **order, "heatmaps": heatmaps, "keypoints": keypoints}


def fingerprint(name: str, tracklets: list[Tracklet], settings: PackSettings) -> tuple[str, list[Tracklet]]:
    """A hash of all that decides a shard's content, short of the content of pictures and published heatmaps.

    And the tracklets with a keypoint file that does not say which pictures it was made from.
    """
    digest = hashlib.sha256(members.encode_json({"version": VERSION, "shard": name, **settings.described()}))
    unknown = []
    for tracklet in tracklets:
        digest.update(members.encode_json(_described(tracklet, settings.root)))
        keypoints, pictures = _joined_keypoints(tracklet, settings)
        digest.update(keypoints.tobytes())
        digest.update("".join(pictures).encode())
        if settings.keypoints and not pictures:
            unknown.append(tracklet)
    return digest.hexdigest(), unknown


def kept(tar: Path, settings_hash: str, every_byte: bool = False) -> bool:
    """Whether the finished shard `tar` is of the same tracklets and settings; `every_byte`: and has its SHA-256."""
    try:
        index = read_index(index_path(tar))
        header = index.header
        if encode_index(index) != index_path(tar).read_bytes():  # damaged where no reader looks
            return False
        if header["settings"] != settings_hash or not tar.is_file() or tar.stat().st_size != header["bytes"]:
            return False
        return not every_byte or sha256(tar) == header["sha256"]
    except (DataError, OSError):
        return False


def write_shard(tar: Path, tracklets: list[Tracklet], settings: PackSettings, settings_hash: str) -> Iterator[int]:
    """Write the shard `tar` and its index, and yield each tracklet's number of frames when it is written.

    Args:
        settings_hash: the fingerprint, by which `kept` will know the shard again.

    Raises:
        DataError: a picture, keypoint file or heatmap file is missing, damaged or does not fit; nothing is left behind.
        KeyreidError: the shard cannot be written.
    """
    pieces = []
    with writing(tar):
        with replacing(tar) as partial:
            owner = {"user": "keyreid", "group": "keyreid"}
            with (
                partial.open("wb", buffering=1 << 20) as file,
                TarWriter(file, encoder=False, compress=False, mtime=0, mode=0o644, **owner) as out,
            ):
                out.tarstream.format = tarfile.USTAR_FORMAT  # plain headers; TarWriter leaves its argument unused
                for tracklet in tracklets:
                    pieces.append(_write_tracklet(out, tracklet, settings))
                    yield len(tracklet.frames)
            if not partial.exists():
                raise KeyreidError(f"{tar}: another `keyreid shard` is packing the same share into this folder")
            sync(partial)
            written = {"shard": tar.name, "bytes": partial.stat().st_size, "sha256": sha256(partial)}
            index_path(tar).unlink(missing_ok=True)  # an old one must not vouch for the new shard
        header = {"format": f"keyreid-index/{VERSION}", **written, "parts": settings.parts, "settings": settings_hash}
        replace_bytes(index_path(tar), encode_index(ShardIndex.joined(header, pieces)))


def _write_tracklet(out: TarWriter, tracklet: Tracklet, settings: PackSettings) -> ShardIndex:
    """Add a tracklet to the tar; gives its part of the index."""
    members.check_key(tracklet.key)
    packed = (_picture(tracklet, frame, settings) for frame in tracklet.frames)
    pictures, kinds, sizes, hashes = zip(*packed, strict=True)
    width, height = np.array(sizes).T
    keypoints, _ = _joined_keypoints(tracklet, settings, hashes)
    if settings.heatmaps:
        tiles = _foreign_tiles(tracklet, settings, hashes)
        visible = tiles.any((2, 3))
    else:
        tiles = render_tiles(keypoints, width, height, settings.parts)
        visible = visibility(keypoints, width, height, settings.parts)
    bits = (visible << np.arange(settings.parts)).sum(1)

    described = _described(tracklet, settings.root)
    described |= {"size": sizes[0]} if len(set(sizes)) == 1 else {"sizes": sizes}
    described |= {"visibility": bits.tolist(), "parts": list(part_names(settings.parts))}
    contents = [members.encode_json(described), members.encode_keypoints(keypoints)]
    for picture, tile in zip(pictures, tiles, strict=True):
        contents += [picture, members.encode_tiles(tile)]
    offsets = []
    for member, content in enumerate(contents):
        # One call a member: TarWriter sorts the members of one call, and a reader wants the JSON first.
        name = members.member_name(member, kinds[members.frame_of(member)])
        out.write({"__key__": tracklet.key, name: content})
        offsets.append(out.tarstream.offset - -(-len(content) // TAR_BLOCK) * TAR_BLOCK)
    # The columns in the order of ShardIndex: of the tracklet, of its members, of its frames.
    key, identity, camera, split, frames = index_facts(tracklet)
    columns = [[key], [identity], [camera], [members.SPLITS.index(split)], [frames], offsets]
    columns += [[len(content) for content in contents], [zlib.crc32(content) for content in contents]]
    columns += [[members.PICTURES.index(kind) for kind in kinds], width, height, bits]
    return ShardIndex({}, *map(np.array, columns))


def index_facts(tracklet: Tracklet) -> tuple[str, int, int, str, int]:
    """What the index says of a tracklet: key, identity, camera, split and number of frames."""
    identity = members.UNKNOWN_IDENTITY if tracklet.identity is None else tracklet.identity
    return tracklet.key, identity, tracklet.camera, tracklet.split, len(tracklet.frames)


def _described(tracklet: Tracklet, root: Path) -> dict[str, Any]:
    """What a tracklet's JSON says about it before its pictures are read."""
    described: dict[str, Any] = {name: getattr(tracklet, name) for name in ("key", "identity", "camera", "split")}
    sources = _sources([frame.path for frame in tracklet.frames], root)
    described |= {"format": f"keyreid-tracklet/{VERSION}", "frames": len(tracklet.frames), "source": sources}
    if any(frame.box is not None for frame in tracklet.frames):
        described["boxes"] = [frame.box and [round(float(v), 3) for v in frame.box] for frame in tracklet.frames]
    if any(frame.video_frame is not None for frame in tracklet.frames):
        described["video_frames"] = [frame.video_frame for frame in tracklet.frames]
    return described


def _sources(paths: list[Path], root: Path) -> dict[str, Any]:
    """The frames' files, named from the dataset's folder: one for all, or their folder and their names in it."""
    prefix = f"{root}{os.sep}"
    names = [str(path).removeprefix(prefix).replace(os.sep, "/") for path in paths]
    if len(set(names)) == 1:
        return {"file": names[0]}
    folders = {name.rpartition("/")[0] for name in names}
    if len(folders) > 1:
        return {"folder": "", "files": names}
    return {"folder": folders.pop(), "files": [name.rpartition("/")[2] for name in names]}


def _picture(tracklet: Tracklet, frame: Frame, settings: PackSettings) -> tuple[bytes, str, tuple[int, int], str]:
    """A frame's file content, its kind, its size and the hash of its source, after a look whether it decodes."""
    try:
        content, kind = source.read_frame(frame)
        known_by = source.content_hash(content)
        if settings.image == "jpeg" and kind != "jpg":
            picture = source.decode(content, cv2.IMREAD_COLOR)
            content = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, settings.quality])[1].tobytes()
            kind = "jpg"
        size = members.picture_size(content, kind)
        if max(size) > members.LARGEST_SIDE:
            raise ValueError(f"{size[0]} x {size[1]} pixels: more than {members.LARGEST_SIDE} on a side")
        members.check_picture(content)
        return content, kind, size, known_by
    except (DataError, ValueError) as error:
        place = "" if str(frame.path) in str(error) else f"{frame.path}: "
        raise DataError(
            f"{place}{error} (tracklet {tracklet.key}); mend or remove the picture and run the same command again"
        ) from None


def load_keypoints(tracklet: Tracklet, settings: PackSettings) -> np.ndarray:
    """float32 [T, 17, 3] of a tracklet: from its keypoint file, its own, or zeros."""
    return _joined_keypoints(tracklet, settings)[0]


def _joined_keypoints(
    tracklet: Tracklet, settings: PackSettings, hashes: tuple[str, ...] = ()
) -> tuple[np.ndarray, tuple[str, ...]]:
    """The same, and what their file says of its pictures, which with `hashes` must be these."""
    if settings.keypoints is None:
        own = tracklet.keypoints
        return np.zeros((len(tracklet.frames), 17, 3), np.float32) if own is None else np.asarray(own, np.float32), ()
    file = keypoint_files.load(keypoint_files.path_of(settings.keypoints, tracklet.key), tracklet, hashes)
    return file.keypoints, file.pictures


def _foreign_tiles(tracklet: Tracklet, settings: PackSettings, hashes: tuple[str, ...]) -> np.ndarray:
    """Heatmaps that somebody else made, as tiles uint8 [T, P, 64, 32]: the tracklet's file, or one `.npy` a frame."""
    assert settings.heatmaps is not None
    path = heatmap_files.path_of(settings.heatmaps, tracklet.key)
    if path.is_file():
        heatmaps = [(path, heatmap) for _, heatmap in heatmap_files.load(path, tracklet, hashes)]
    else:
        heatmaps = [_published_heatmap(tracklet, frame, settings) for frame in tracklet.frames]
    return np.stack([_tiles(origin, heatmap, settings.parts) for origin, heatmap in heatmaps])


def _published_heatmap(tracklet: Tracklet, frame: Frame, settings: PackSettings) -> tuple[Path, np.ndarray]:
    """A published heatmap file, float [P, H, W]: it mirrors the dataset's folders, or lies in the folder itself."""
    relative = Path(str(frame.path).removeprefix(f"{settings.root}{os.sep}"))
    candidates = [settings.heatmaps / relative.with_suffix(".npy"), settings.heatmaps / f"{frame.path.stem}.npy"]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None or frame.box is not None or frame.video_frame is not None:
        raise DataError(f"tracklet {tracklet.key}: no heatmap file {candidates[0]}, nor {candidates[1]}")
    try:
        return path, np.asarray(np.load(path, allow_pickle=False))
    except Exception as error:  # NumPy raises many kinds
        raise DataError(f"{path}: not a heatmap file: {error} (tracklet {tracklet.key})") from None


def _tiles(path: Path, heatmap: np.ndarray, parts: int) -> np.ndarray:
    check_heatmaps(path, heatmap)
    if len(heatmap) != parts:
        raise DataError(f"{path}: heatmaps of shape {heatmap.shape}, expected [{parts}, height, width]")
    size = TILE_WIDTH, TILE_HEIGHT
    pooled = [cv2.resize(part, size, interpolation=cv2.INTER_AREA) for part in heatmap.astype(np.float32)]
    return (np.stack(pooled).clip(0, 1) * 255 + 0.5).astype(np.uint8)
