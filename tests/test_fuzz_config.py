"""Any bytes as a configuration, override, search or weights header give a result or a KeyreidError, within seconds."""

import json
import struct

import pytest
import yaml
from fuzzing import fuzz
from hypothesis import strategies as st

from keyreid.checkpoints.weights_file import FORMAT, check_sha256, read_header
from keyreid.config import Config, load_config
from keyreid.errors import ConfigError, KeyreidError

SEED = b"""# of a run
name: mars
data: {shards: shards/mars, identities: 4}
model:
  backbone: vit_base_patch16_224
  weights: null
optimizer: {name: adamw, lr: 1.0e-3, betas: [0.9, 0.999]}
training:
  precision: bf16
  clip_gradient_norm: 10
"""
SEARCH = (
    b"base: base.yaml\ntrials: 3\nspace:\n  loss.alpha: {uniform: [0.3, 0.9]}\n  data.identities: {choice: [4, 8]}\n"
)
PIECES = """
*a [ ] { } ~ null yes 2026-11-25 12:30:45 0o17 007 1e5 .inf -.nan 999999999999999999999999999999 ${ } ${a.b}
${oc.env:HOME} é 🙂 ../ /dev/null ~nobody/x
""".split()  # noqa: SIM905
# fmt: off
PIECES += [
    "&a ", "<<: ", "- ", "? ", ": ", ", ", "\n", "\n  ", "# ", "| ", "> ", "'", "\"", "---\n", "...\n",
    "%YAML 1.1\n", "!!binary ", "!!timestamp ", "!!set ", "!!int ", "!!float ", "!!python/name:os.system ", "!x ",
    "9" * 5000, "\\x00", "\\ud800", "\\U0010ffff", "\0", "\ufeff", "\u2028", "\x85", "x" * 300, "extends: ",
    "name: ", "data: ", "shards: ", "model: ", "loss.alpha: ", "space: ", "grid: ", "choice: ", "when: ", "base: ",
]
# fmt: on
SECTIONS = [*Config.model_fields, "extends", "base", "settings", "space", "trials", "algorithm"]
FIELDS = [name for field in Config.model_fields.values() for name in getattr(field.annotation, "model_fields", [])]
KEYS = st.one_of(
    st.sampled_from([*SECTIONS, *FIELDS, "uniform", "grid", "choice", "when", "", "a..b"]), st.text(max_size=5)
)
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.dates(), st.binary(max_size=9)
)
TREES = st.recursive(LEAVES, lambda below: st.lists(below, max_size=4) | st.dictionaries(KEYS, below, max_size=4))


def mutated(seed: bytes):
    """The seed with up to three pieces of it replaced."""
    pieces = st.one_of(st.binary(max_size=8), st.sampled_from(PIECES).map(lambda text: text.encode("utf-8", "replace")))
    edits = st.lists(st.tuples(st.integers(0, len(seed)), st.integers(0, 30), pieces), max_size=3)

    def edit(changes):
        content = seed
        for place, length, new in changes:
            content = content[:place] + new + content[place + length :]
        return content

    return edits.map(edit)


def documents(seed: bytes):
    pieces = st.lists(st.sampled_from(PIECES), max_size=20).map(lambda words: "".join(words).encode("utf-8", "replace"))
    trees = st.dictionaries(st.sampled_from(SECTIONS), TREES, max_size=5).map(
        lambda tree: yaml.safe_dump(tree).encode()
    )
    return st.one_of(st.binary(max_size=200), mutated(seed), pieces, trees)


OVERRIDES = st.one_of(
    st.text(max_size=30),
    st.builds("{}.{}={}".format, st.sampled_from(SECTIONS), st.sampled_from(FIELDS), st.sampled_from(PIECES)),
    st.builds("{}={}".format, st.sampled_from([*SECTIONS, *FIELDS, "a..b", ".", "", "a[0]"]), st.text(max_size=10)),
    st.builds(
        "{}={}".format, st.sampled_from(FIELDS), TREES.map(lambda tree: yaml.safe_dump(tree, default_flow_style=True))
    ),
)


def test_configuration_files(tmp_path):
    def check(content):
        path = tmp_path / "config.yaml"
        path.write_bytes(content)
        try:
            assert isinstance(load_config(path), Config)
        except KeyreidError as error:
            assert len(str(error)) < 6000

    fuzz(check, documents(SEED))


def test_overrides(tmp_path):
    base = tmp_path / "base.yaml"
    base.write_text("data: {shards: here}\n")

    def check(overrides):
        try:
            config = load_config(base, overrides)
            yaml.dump(config.model_dump(mode="json"), Dumper=yaml.CSafeDumper)
        except ConfigError as error:
            assert len(str(error)) < 6000

    fuzz(check, st.lists(OVERRIDES, min_size=1, max_size=3))


def test_search_files(tmp_path):
    pytest.importorskip("optuna")
    from keyreid.tuning.search import load_search

    (tmp_path / "base.yaml").write_bytes(SEED)

    def check(content, overrides):
        path = tmp_path / "search.yaml"
        path.write_bytes(content)
        try:
            load_search(path, overrides)
        except KeyreidError as error:
            assert len(str(error)) < 6000

    fuzz(check, documents(SEARCH), st.lists(OVERRIDES, max_size=1))


def test_weights_headers(tmp_path):
    """Whatever JSON, or none, stands in a safetensors file's metadata."""
    header = {"sha256": "0" * 64, "model": {}, "clip": {}, "identities": [1], "cameras": [1], "about": {}}
    seed = json.dumps(header).encode()
    values = st.dictionaries(
        st.sampled_from([*header, "x"]), TREES.map(repr) | st.none() | st.integers() | st.lists(st.integers())
    )
    texts = st.one_of(
        mutated(seed).map(lambda raw: raw.decode("latin-1")), values.map(lambda tree: json.dumps(header | tree))
    )
    texts |= st.sampled_from(["[" * 100_000, '{"model":' * 50_000, "9" * 5000, "[]", "7", '{"sha256": "\\ud800"}'])
    whole = st.tuples(st.sampled_from([FORMAT, "format"]), texts).map(
        lambda pair: json.dumps({"__metadata__": dict([pair])})
    )
    files = whole.map(lambda text: struct.pack("<Q", len(text.encode())) + text.encode()) | st.binary(max_size=50)

    def check(content):
        path = tmp_path / "weights.safetensors"
        path.write_bytes(content)
        for read in (read_header, check_sha256):
            try:
                read(path)
            except KeyreidError as error:
                assert "weights.safetensors" in str(error)

    fuzz(check, files)
