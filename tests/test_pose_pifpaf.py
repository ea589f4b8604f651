"""OpenPifPaf's encoder and decoder, and how checkpoints are loaded."""

import pickle
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from keyreid.errors import CheckpointError
from keyreid.pose import pifpaf
from keyreid.pose.pictures import Pose, choose, fit

pytestmark = pytest.mark.skipif(find_spec("openpifpaf") is None, reason="no OpenPifPaf: run launch/install-pose")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return pifpaf.build_network(pifpaf.WALKERS).eval()


def random_poses(count: int) -> np.ndarray:
    """Standing people of several sizes, each joint a little elsewhere, in a picture of 129 x 257."""
    rng = np.random.default_rng(0)
    upright = np.array(pifpaf.import_openpifpaf().plugins.coco.constants.COCO_UPRIGHT_POSE)
    size = rng.uniform(14, 22, (count, 1, 1))
    poses = upright * np.array([1, -1, 1]) * np.concatenate([size, size, np.ones_like(size)], axis=2)
    poses[..., :2] += rng.uniform(-2, 2, (count, 17, 2)) - poses[..., :2].mean(1, keepdims=True) + [64, 128]
    return poses.astype(np.float32)


def test_known_poses_survive_encoding_and_the_real_decoder(network):
    encode, decoder = pifpaf.Encoder(network), pifpaf.PoseDecoder(network)
    worst = 0.0
    for keypoints in random_poses(60):
        (found,) = decoder.fields([pifpaf.fields_of_targets(*encode(keypoints, 129, 257))])
        assert len(found) == 1
        assert (found[0].keypoints[:, 2] > 0).all()
        worst = max(worst, float(abs(found[0].keypoints[:, :2] - keypoints[:, :2]).max()))
    assert worst < 0.01
    assert pifpaf.check() < 0.01


def test_what_was_decoded_before_changes_nothing(network):
    """OpenPifPaf's decoder alone drifts by 1e-5 pixels with every picture; files would then depend on interruptions."""
    encode, decoder = pifpaf.Encoder(network), pifpaf.PoseDecoder(network)
    fields = [pifpaf.fields_of_targets(*encode(keypoints, 129, 257)) for keypoints in random_poses(5)]
    first = [poses[0].keypoints for poses in decoder.fields(fields)]
    again = [poses[0].keypoints for poses in decoder.fields(fields)]
    np.testing.assert_array_equal(first, again)


def test_joints_that_are_not_there_are_not_found(network):
    keypoints = random_poses(1)[0]
    keypoints[[9, 15]] = 0
    encode, decoder = pifpaf.Encoder(network), pifpaf.PoseDecoder(network)
    ((found,),) = decoder.fields([pifpaf.fields_of_targets(*encode(keypoints, 129, 257))])
    assert np.flatnonzero(found.keypoints[:, 2] == 0).tolist() == [9, 15]


@pytest.mark.parametrize(
    ("width", "height", "long_edge"), [(128, 256, None), (64, 128, 256), (37, 90, 129), (90, 37, 97)]
)
def test_pictures_go_through_as_openpifpaf_itself_sends_them(network, width, height, long_edge):
    """Same pixels into the network, and coordinates moved back the same way, as by OpenPifPaf's own preprocessing."""
    from PIL import Image

    transforms = pifpaf.import_openpifpaf().transforms
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    steps = [transforms.NormalizeAnnotations()]
    if long_edge is not None:
        steps.append(transforms.RescaleAbsolute(long_edge, fast=True))
    preprocess = transforms.Compose([*steps, transforms.CenterPadTight(16), transforms.EVAL_TRANSFORM])
    expected, _, meta = preprocess(Image.fromarray(picture), [], None)

    fitted = fit(picture, long_edge)
    pixels = pifpaf.normalise(torch.from_numpy(fitted.pixels).permute(2, 0, 1)[None])[0]
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)

    annotation = pifpaf.import_openpifpaf().Annotation(list(pifpaf.KEYPOINT_NAMES), [(1, 2)])
    inside = np.random.default_rng(1).uniform([1, 1, 0.2], [width - 2, height - 2, 1], (17, 3)).astype(np.float32)
    annotation.data[:] = inside * [*fitted.scale, 1] + [*fitted.offset, 0]
    np.testing.assert_allclose(annotation.inverse_transform(meta).data, inside, atol=1e-3)
    np.testing.assert_allclose(fitted.to_picture(Pose(annotation.data, 1.0)).keypoints, inside, atol=1e-3)


def test_joints_outside_the_picture_are_missing():
    fitted = fit(np.zeros((40, 20, 3), np.uint8), None)
    keypoints = np.zeros((17, 3), np.float32)
    keypoints[:5] = [(-0.6, 3, 1), (-1.2, 3, 1), (19.9, 39.9, 1), (20.1, 3, 1), (3, 40.5, 1)]
    keypoints[:, :2] += fitted.offset
    moved = fitted.to_picture(Pose(keypoints, 1.0)).keypoints
    np.testing.assert_allclose(moved[0], [0, 3, 1], atol=1e-5)  # still pixel 0, as heatmaps round
    np.testing.assert_allclose(moved[2], [19.9, 39.9, 1], atol=1e-5)
    assert not moved[[1, 3, 4]].any()


def test_best_person_by_score_or_by_place():
    def person(x: float) -> np.ndarray:
        return np.tile(np.array([x, 50, 1], np.float32), (17, 1))

    people = [(person(10), 0.9), (person(30), 0.4), (np.zeros((17, 3), np.float32), 0.99)]
    assert choose(people, (64, 128), "score") is people[0]
    assert choose(people, (64, 128), "centre") is people[1]
    assert choose(people[2:], (64, 128), "score") is None


def test_weights_files_come_back_as_they_were(network, tmp_path):
    path = tmp_path / "small.safetensors"
    pifpaf.save_weights(network, path)
    loaded, sha256 = pifpaf.load_network(str(path))
    assert len(sha256) == 64
    for name, tensor in network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_openpifpafs_own_networks_convert_to_weights_files(tmp_path):
    """A pickled network needs trust; its weights file does not, and finds the same."""
    original = pifpaf.build_network("mobilenetv2", upsample=2).eval()
    pickled, safe = tmp_path / "published.pkl", tmp_path / "safe.safetensors"
    torch.save({"model": original, "epoch": 1}, pickled)
    with pytest.raises(CheckpointError, match="--trust"):
        pifpaf.load_network(str(pickled))
    trusted, _ = pifpaf.load_network(str(pickled), trust=True)
    pifpaf.save_weights(trusted, safe)
    loaded, _ = pifpaf.load_network(str(safe))
    picture = torch.randn(1, 3, 97, 65)
    with torch.inference_mode():
        for ours, theirs in zip(loaded(picture), original(picture), strict=True):
            torch.testing.assert_close(ours, theirs)


class _Trap:
    """Pickled, it creates a file when it is loaded."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_bad_checkpoints_are_named_and_never_run(network, tmp_path):
    trap, sprung = tmp_path / "trap.pkl", tmp_path / "sprung"
    trap.write_bytes(pickle.dumps(_Trap(str(sprung))))
    with pytest.raises(CheckpointError, match=r"trap\.pkl.*--trust"):
        pifpaf.load_network(str(trap))
    assert not sprung.exists()

    with pytest.raises(CheckpointError, match=r"none of walkers, .*shufflenetv2k16"):
        pifpaf.load_network("no-such-network")
    with pytest.raises(CheckpointError, match="no such pose weights file"):
        pifpaf.load_network(str(tmp_path / "absent.safetensors"))
    cut = tmp_path / "cut.safetensors"
    pifpaf.save_weights(network, cut)
    cut.write_bytes(cut.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="not a pose weights file"):
        pifpaf.load_network(str(cut))


def test_threshold_lets_weaker_joints_through(network):
    encode = pifpaf.Encoder(network)
    cif, caf = pifpaf.fields_of_targets(*encode(random_poses(1)[0], 129, 257))
    cif[9, 1] *= 0.3  # a weak left wrist
    caf[11, 1] *= 0.3
    try:
        shown = {}
        for threshold in (0.15, 0.6):
            ((found,),) = pifpaf.PoseDecoder(network, threshold=threshold).fields([(cif.clone(), caf.clone())])
            shown[threshold] = int((found.keypoints[:, 2] > 0).sum())
        assert shown[0.15] == 17
        assert shown[0.6] == 16
    finally:
        pifpaf.PoseDecoder(network, threshold=0.15)
