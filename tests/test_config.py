"""Loading, merging and checking configurations."""

from pathlib import Path

import pytest

from keyreid.config import load_config, save_config
from keyreid.errors import ConfigError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.fixture
def base(tmp_path):
    return write(tmp_path / "base.yaml", "data: {shards: here, identities: 8}\nloss: {alpha: 0.5, centre: 0.1}\n")


def test_parents_then_file_then_overrides(tmp_path, base):
    (tmp_path / "deep").mkdir()
    child = write(tmp_path / "deep" / "child.yaml", "extends: ../base.yaml\nloss: {alpha: 0.6}\n")
    config = load_config(child, ["data.identities=2", "data.augment.erase_area=[0.1,0.2]"])
    assert (config.loss.alpha, config.loss.centre) == (0.6, 0.1)
    assert (config.data.identities, config.data.shards) == (2, "here")
    assert config.data.augment.erase_area == (0.1, 0.2)


def test_saved_configuration_loads_as_it_was(tmp_path, base):
    config = load_config(base, ["training.deepspeed={zero_optimization: {stage: 1}}", "evaluation.clips=3"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["loss.alpa=0.6"], "'loss.alpa'; the nearest known one is 'loss.alpha'"),
        (["model.tcss.shfit=1"], "the nearest known one is 'model.tcss.shift'"),
        (["loss.alpha=1.5"], "loss.alpha: .*less than or equal to 1"),
        (["model.parts=5"], "model.parts"),
        (["training.accumulation=3"], "accumulation=3 does not divide the batch of 32"),
        (["name=../elsewhere"], "name: "),
        (["loss.alpha"], "not of the form"),
        (["optimizer.lr=nan"], "optimizer.lr"),
    ],
)
def test_what_is_wrong_is_named(base, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(base, overrides)


def test_missing_and_circular_parents(tmp_path):
    child = write(tmp_path / "a.yaml", "extends: nowhere.yaml\n")
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file.*named by `extends` in .*a\.yaml"):
        load_config(child)
    write(tmp_path / "b.yaml", "extends: c.yaml\n")
    write(tmp_path / "c.yaml", "extends: b.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_config(tmp_path / "b.yaml")


@pytest.mark.parametrize(("text", "message"), [("- 1", "a mapping"), ("a: 1\na: 2", "duplicate key a"), ("7", "int")])
def test_what_is_no_configuration_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path / "file.yaml", text))


def test_an_own_file_comes_before_the_one_that_comes_with_keyreid(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/mars.yaml").name == "mars"
    child = write(tmp_path / "child.yaml", "extends: configs/walkers.yaml\n")
    assert load_config(child).name == "walkers"
    (tmp_path / "configs").mkdir()
    write(tmp_path / "configs" / "mars.yaml", "name: mine\ndata: {shards: here}\n")
    assert load_config("configs/mars.yaml").name == "mine"
    with pytest.raises(ConfigError, match=r"configs/marz\.yaml: No such file"):
        load_config("configs/marz.yaml")


def test_objects_in_yaml_are_not_built(tmp_path):
    path = write(tmp_path / "evil.yaml", "name: !!python/object/apply:os.system ['touch owned']\n")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(path)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_right(path):
    assert load_config(path).data.batch_size == {"walkers": 64, "mars_large": 256, "large": 4096}.get(path.stem, 16)
