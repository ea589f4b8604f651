"""Pictures: right colours, no text cut, and maps that show what the network computes."""

import itertools

import numpy as np
import pytest
import torch
from evaluation_toys import toy_config, toy_network
from PIL import Image
from typer.testing import CliRunner

from keyreid.backbones.vit import ViT
from keyreid.checkpoints.weights_file import WeightsHeader, write_weights
from keyreid.cli import app
from keyreid.embedding.features import extract
from keyreid.errors import DataError
from keyreid.evaluation.pictures import chosen_queries, write_result_page
from keyreid.evaluation.protocols import PROTOCOLS
from keyreid.evaluation.ranking import query_and_gallery, rank_gallery
from keyreid.shards import open_reader
from keyreid.shards.plan import evaluation_clips
from keyreid.visualization.attention import attention_maps
from keyreid.visualization.canvas import QUERY, RIGHT, UNKNOWN, WRONG, fit_text, text_width
from keyreid.visualization.curves import draw_cmc
from keyreid.visualization.ranked import FRAME, PICTURE, RankedRow, Tile, draw_ranked
from keyreid.visualization.strips import Strip, draw_strips, overlay


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    shards, config, model, _ = toy_network(folder)
    vectors = extract(model, shards, range(len(shards)), config)
    vectors.save(folder / "vectors.parquet")
    return shards, config, model, vectors, folder


def flat(colour):
    return np.full((80, 40, 3), colour, np.uint8)


def outer_border(image):
    """The pixels within 8 of the edge; text that is cut reaches them."""
    pixels = np.asarray(image)
    inside = np.zeros(pixels.shape[:2], bool)
    inside[8:-8, 8:-8] = True
    return pixels[~inside]


def test_frames_have_the_verdicts_colours_in_order():
    tiles = [Tile(flat(10 * n), (f"{n}", "camera 1"), verdict) for n, verdict in enumerate([True, False, None])]
    image = draw_ranked(
        [("Best", [RankedRow("a query", Tile(flat(200), ("query", "camera 2")), tiles)])], "title", "under it"
    )
    pixels = np.asarray(image)
    row = next(y for y in range(len(pixels)) if (pixels[y] == QUERY).all(axis=1).any())
    middle = pixels[row + FRAME + PICTURE[1] // 2]
    places = [np.flatnonzero((middle == colour).all(axis=1)) for colour in (QUERY, RIGHT, WRONG, UNKNOWN)]
    assert [len(place) for place in places] == [2 * FRAME] * 4
    assert all(a[-1] < b[0] for a, b in itertools.pairwise(places))
    for place, value in zip(places, (200, 0, 10, 20), strict=True):
        assert (middle[place[FRAME - 1] + 10] == value).all()


@pytest.mark.parametrize("long", [False, True])
def test_no_text_leaves_the_picture(long):
    word = "0123456789 WWWW " * (12 if long else 1)
    rows = [RankedRow(word, Tile(flat(90), (word[:60], "camera 1")), [Tile(flat(90), ("1", word[:40]), True)])]
    strips = [Strip(word, ["0", "1"], [(word[:30], [flat(90), flat(40)])])] * 3
    for image in (draw_ranked([("Best", rows), ("Worst", [])], word, word), draw_strips(strips, word, word)):
        assert (outer_border(image) == 255).all()
    assert text_width(fit_text(word, 100, 13), 13) <= 100
    assert fit_text("short", 100, 13) == "short"


def test_overlay_shows_weights_in_place():
    weights = np.zeros((16, 8))
    weights[:4] = 1
    shown = overlay(flat(128), weights)
    assert shown[5, 20, 0] > shown[5, 20, 2] + 60  # red at the top
    assert np.ptp(shown[60, 20].astype(int)) <= 2  # grey below


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_ranked_lists_are_what_was_judged(toy, protocol):
    """AP and first match, counted from the lists that the pictures show, are the scores."""
    shards, config, _, vectors, _ = toy
    query, gallery = query_and_gallery(shards, 0)
    ranking = rank_gallery(vectors, shards, query, gallery, config.evaluation, (protocol,))[protocol]
    for row, shown in ranking.nearest(np.arange(len(query)), top=len(ranking.gallery)).items():
        _, distances, right = zip(*shown, strict=True)
        assert (np.diff(distances) >= 0).all()
        ranks = np.flatnonzero(right) + 1
        assert ranking.scores.first_match[row] == (ranks[0] if len(ranks) else 0)
        if not len(ranks):
            continue
        precision = np.arange(1, len(ranks) + 1) / ranks
        if protocol == "official":
            before = [1.0 if rank == 1 else n / (rank - 1) for n, rank in enumerate(ranks)]
            precision = (precision + before) / 2
        assert ranking.scores.average_precision[row] == pytest.approx(precision.mean())
    chosen = chosen_queries(ranking, 2, seed=0)
    ap = ranking.scores.average_precision
    assert not set(chosen["Best queries"]) & set(chosen["Worst queries"])
    if len(chosen["Worst queries"]):
        assert ap[chosen["Best queries"]].min() >= ap[chosen["Worst queries"]].max()


def test_attention_is_where_the_guidance_is(toy):
    """Guidance on one patch: through TCSS and back, each part's attention has its peak on that very patch."""
    shards, config, model, _, _ = toy
    reader = open_reader(shards, iter([evaluation_clips(shards, [3, 7, 8], 2)[:3]]), config, workers=0)
    batch = next(iter(reader))
    reader.close()
    rows, columns = model.patch_grid
    batch.guidance.zero_()
    for part in range(6):
        batch.guidance[:, :, part, part % rows, part % columns] = 1
    hooks = len(model.global_branch.block.attention._forward_pre_hooks)
    maps = attention_maps(model, batch)
    assert maps.frames.shape == (3, 2, rows, columns)
    assert maps.parts.shape == (3, 6, rows, columns)
    assert ((maps.frames > 0) & (maps.frames < 1)).all()
    assert (maps.frames.sum((2, 3)) < 1).all()
    for part in range(6):
        peaks = maps.parts[:, part].reshape(3, -1).argmax(1)
        assert (peaks == part % rows * columns + part % columns).all()
    assert len(model.global_branch.block.attention._forward_pre_hooks) == hooks


@pytest.mark.parametrize("known", [True, False])
def test_attention_is_drawn_with_the_cameras_that_were_embedded(toy, tmp_path, known):
    """By `evaluate` and by `visualize attention`: what the backbone is told of the cameras is the same each time."""
    shards, config, model, _, folder = toy
    weights = folder / "weights.safetensors"
    if not known:
        header = WeightsHeader(config.model, config.clip, [0, 1, 2, 3], [7, 8, 9], {"dataset": "another"})
        weights = tmp_path / "elsewhere.safetensors"
        write_weights(weights, model.state_dict(), header)
    told = []
    forward = ViT.forward

    def listening(self, images, cameras, *rest):
        told.append(set(cameras.tolist()))
        return forward(self, images, cameras, *rest)

    settings = ["data.reader=plain", "data.workers=1", "training.precision=fp32", "evaluation.pictures=1"]
    here, key = f"--shards={shards.location}", str(shards.tracklets[shards.select("query")[0]].key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ViT, "forward", listening)
        run = CliRunner().invoke(app, ["evaluate", here, f"--out={tmp_path}/out", "--ranks=1", str(weights), *settings])
        assert run.exit_code == 0, run.exception
        *embedded, drawn = told
        told.clear()
        arguments = [here, f"--key={key}", f"--out={tmp_path}/alone.png", str(weights), *settings]
        run = CliRunner().invoke(app, ["visualize", "attention", *arguments])
        assert run.exit_code == 0, run.exception
        kept = [f"--vectors={tmp_path}/out/vectors.parquet", f"--out={tmp_path}/again"]
        run = CliRunner().invoke(app, ["evaluate", here, *kept, str(weights), *settings])
        assert run.exit_code == 0, run.exception
    alone, again = told
    cameras = set().union(*embedded)
    assert (cameras == {-1}) == (not known)
    assert all(shown <= cameras for shown in (drawn, alone, again))


def test_attention_of_unknown_cameras_is_that_of_their_mean(toy):
    shards, _, model, _, _ = toy
    reader = open_reader(shards, iter([evaluation_clips(shards, [3, 7, 8], 2)[:3]]), toy_config(shards), workers=0)
    batch = next(iter(reader))
    reader.close()
    known, unknown = (attention_maps(model, batch, flag) for flag in (True, False))
    assert np.abs(known.frames - unknown.frames).max() > 1e-5
    was = model.backbone.camera.detach().clone()
    with torch.no_grad():
        model.backbone.camera[:] = was.mean(0)
        as_mean = attention_maps(model, batch)
        model.backbone.camera[:] = was
    assert unknown.frames == pytest.approx(as_mean.frames, abs=1e-6)


def test_attention_gives_what_the_network_computes(toy):
    """With one head left and identity values, the attention-weighed rows are the module's own output."""
    from keyreid.model.single_query import SingleQueryAttention
    from keyreid.visualization.attention import _attention

    torch.manual_seed(0)
    module = SingleQueryAttention(8, 1)
    with torch.no_grad():
        for weight in (module.q_weight, module.k_weight, module.v_weight):
            weight.normal_()
        module.qkv_bias.normal_()
        module.proj.weight.copy_(torch.eye(8))
    x, log_weight = torch.randn(3, 5, 8), torch.randn(3, 2, 4)
    with torch.no_grad():
        normalised = torch.nn.functional.layer_norm(x, (8,), module.norm_weight, module.norm_bias, module.eps)
        values = torch.nn.functional.linear(normalised, module.v_weight, module.qkv_bias[16:])
        expected = module(x, log_weight=log_weight)
        assert torch.allclose(_attention(module, x, log_weight) @ values, expected, atol=1e-5)


def test_curves_and_page(tmp_path):
    scores = {
        name: {"cmc": curve, "mAP": 0.5, "valid_queries": 7}
        for name, curve in {"torchreid": [0.5, 0.75, 1.0], "a < b": [0.2, 0.3, 0.4]}.items()
    }
    draw_cmc(scores, "made <data>", tmp_path / "cmc.png")
    with Image.open(tmp_path / "cmc.png") as image:
        assert image.size[0] > 800
        assert (outer_border(image.convert("RGB")) == 255).all()
    counts = dict.fromkeys(("mAP", "mINP", "rank1", "rank5", "rank10", "rank20"), 0.5)
    counts |= dict.fromkeys(("queries", "valid_queries", "gallery", "junk", "distractors"), 3)
    result = {"dataset": "made <data>", "protocol": "official", "protocols": {"official": counts}, "distance": "cosine"}
    write_result_page(tmp_path / "index.html", result, [tmp_path / "cmc.png"])
    page = (tmp_path / "index.html").read_text()
    assert "made &lt;data&gt;" in page
    assert "<data>" not in page
    assert 'src="cmc.png"' in page


def test_commands_draw(toy, tmp_path):
    shards, _, _, vectors, folder = toy
    here, key = f"--shards={shards.location}", str(vectors.keys[16])
    commands = {
        "ranked": [f"{folder}/vectors.parquet", here, "--protocol=inclusive", f"--key={key}"],
        "guidance": [shards.location, "--count=2", "--frames=3"],
        "attention": [f"{folder}/weights.safetensors", here, f"--key={key}", "data.reader=plain", "data.workers=1"],
    }
    for name, arguments in commands.items():
        out = tmp_path / "pictures" / f"{name}.png"
        run = CliRunner().invoke(app, ["visualize", name, f"--out={out}", *arguments])
        assert run.exit_code == 0, (run.output, run.exception)
        with Image.open(out) as image:
            assert f"{image.width} x {image.height} pixels" in run.output
    run = CliRunner().invoke(app, ["visualize", "guidance", shards.location, "--key=nobody"])
    assert isinstance(run.exception, DataError)
    assert "no tracklet has the key nobody" in str(run.exception)
    (tmp_path / "scores.json").write_text("{}")
    run = CliRunner().invoke(app, ["visualize", "curves", str(tmp_path / "scores.json")])
    assert "no scores of an evaluation" in str(run.exception)
