"""The typed configuration of everything keyreid does.

A configuration is YAML. `extends: other.yaml` (a path relative to the file) starts from another one; what follows
overrides it, and dotted overrides from the command line (`loss.alpha=0.6`) come last. Types and bounds are pydantic's.
An unknown key is an error that names the nearest known one. The defaults are the published recipe of KeyRe-ID
(arXiv 2507.07393) unless a comment says otherwise.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

from keyreid import plain_yaml
from keyreid.errors import ConfigError
from keyreid.files import replace_text
from keyreid.guidance import named
from keyreid.resources import own_or_shipped

FAULTS_LISTED = 10
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$"  # of a folder, with room for what is added to it


class Section(BaseModel):
    """One part of the configuration: unknown keys are refused, and values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Share = Annotated[float, Field(ge=0, le=1)]
Ratio = Annotated[float, Field(gt=0)]
Remote = Literal["auto", "shards", "ranges"]
Beta = Annotated[float, Field(ge=0, lt=1)]
SectionType = TypeVar("SectionType", bound=Section)


class ClipConfig(Section):
    """The shape of one model input: a clip of T frames."""

    frames: int = Field(4, ge=1, description="T: frames a clip")
    height: int = Field(256, ge=16, description="pixels; a multiple of the patch size")
    width: int = Field(128, ge=16, description="pixels; a multiple of the patch size")


class AugmentConfig(Section):
    """Random changes of a training frame, each drawn for every frame on its own."""

    flip_probability: float = Field(0.5, ge=0, le=1)
    pad_pixels: int = Field(10, ge=0, description="zero border added on each side before the random crop")
    erase_probability: float = Field(0.5, ge=0, le=1)
    erase_area: tuple[Share, Share] = Field((0.02, 0.4), description="share of the picture, least and most")
    erase_aspect: tuple[Ratio, Ratio] = Field((0.3, 3.3), description="height over width, least and most")


class DataConfig(Section):
    """Where the shards are, how batches are drawn from them, and who reads them."""

    shards: str = Field(description="folder or URL (s3://, gs://, https://) that `keyreid shard` wrote")
    split_number: int = Field(0, ge=0, description="which train/test split (iLIDS-VID, PRID2011: 0..9)")
    holdout: float = Field(0, ge=0, lt=1, description="share of training identities kept out, to choose settings by")
    # plain: PyTorch workers, without DALI. stream: whole tars in order by the webdataset library, nothing kept on disk,
    # to evaluate remote shards.
    reader: Literal["dali", "plain", "stream"] = "dali"
    workers: int = Field(2, ge=1, description="decoding threads (DALI) or processes (plain) of each rank")
    prefetch: int = Field(2, ge=1, description="batches decoded ahead")
    identities: int = Field(4, ge=1, description="P: identities a global batch, over all ranks together")
    tracklets: int = Field(4, ge=1, description="K: tracklets an identity in a batch")
    lanes: int = Field(1, ge=1, description="L: parts of a batch that choose their tracklets apart; it divides P")
    # Whole shards are read one window after the other; the set must be packed with --order identities.
    window: int = Field(0, ge=0, description="identities that a lane draws from at a time, about; 0: from all")
    # identity: each tracklet has its turn. frames: an identity's tracklets are drawn by their length. camera: the K
    # tracklets of an identity come from as many cameras as it has.
    sampler: Literal["identity", "frames", "camera"] = "identity"
    guidance_from: Literal["heatmaps", "keypoints"] = Field("heatmaps", description="packed, or drawn from keypoints")
    on_fault: Literal["stop", "skip"] = Field("stop", description="what a sample that cannot be read does to the run")
    max_faults: int = Field(100, ge=0, description="with on_fault: skip, how many before the run stops all the same")
    # shards: whole, into the cache. ranges: only the bytes that are read, and nothing is kept. auto: shards where all
    # fit the cache, so that each is fetched once; otherwise ranges, if the server sends them.
    remote: Remote = Field("auto", description="how shards of a URL are read")
    cache_dir: str = Field("~/.cache/keyreid/shards", description="where remote shards are kept")
    cache_gigabytes: float = Field(200.0, gt=0, description="bound of that cache")
    augment: AugmentConfig = AugmentConfig()

    @property
    def batch_size(self) -> int:
        """Clips a global batch, over all ranks."""
        return self.identities * self.tracklets

    @property
    def batch(self) -> str:
        """The global batch as messages name it."""
        return f"the batch of {self.batch_size} clips (data.identities x data.tracklets)"


class TcssConfig(Section):
    """Temporal clip shift and shuffle of the local branch's rows."""

    enabled: bool = True
    shift: int = Field(4, ge=0, description="rows that move from the front to the end")
    groups: int = Field(2, ge=1, description="parts that the shifted rows are cut into before they are interleaved")


class ModelConfig(Section):
    """The network: a backbone with a global and a keypoint-guided local branch."""

    backbone: str = Field("vit_base_patch16_224", description="any VisionTransformer of timm, or of keyreid/backbones")
    # Initial backbone. timm: timm's own download of it.
    weights: str | None = Field(None, description="a file (.pth, .safetensors), `timm`, or nothing for random weights")
    weights_grid: tuple[PositiveInt, PositiveInt] | None = Field(None, description="rows, columns of their positions")
    allow_partial: tuple[str, ...] = Field((), description="what they may lack: patterns of entries, as [blocks.11.*]")
    keep_classifiers: bool = Field(True, description="of weights of a whole network with as many identities")
    depth: int | None = Field(None, ge=2, description="blocks of the backbone that are used; default all")
    patch_stride: int | None = Field(None, ge=1, description="pixels between patches; default the patch size")
    guidance: str = Field("aligned", description="released: as the published code, for its checkpoints; docs/model.md")
    guidance_epsilon: float = Field(1e-2, gt=0, description="aligned: e in the attention's log(guidance + e)")
    parts: Literal[3, 4, 6] = Field(6, description="body parts of the local branch")
    local_heads: int = Field(12, ge=1, description="attention heads of the local branch; divide frames x width")
    camera_embedding: float = Field(3.0, ge=0, description="factor on the camera embedding; 0: none")
    drop_path: float = Field(0.1, ge=0, lt=1, description="stochastic depth at the last block")
    tcss: TcssConfig = TcssConfig()
    # sharded: each rank holds and trains some of the classes; see docs/scaling.md.
    classifiers: Literal["replicated", "sharded"] = "replicated"

    @field_validator("guidance")
    @classmethod
    def _known_guidance(cls, name: str) -> str:
        try:
            return named(name).name
        except ConfigError as error:
            raise ValueError(str(error)) from None


class LossConfig(Section):
    """L = alpha L_global + (1 - alpha) mean_p L_part + attention * L_attention; see keyreid/losses.py."""

    alpha: float = Field(0.75, ge=0, le=1, description="weight of the global branch against the local one")
    identity: float = Field(1.0, ge=0, description="weight of the cross entropy")
    triplet: float = Field(1.0, ge=0, description="weight of the batch-hard triplet loss")
    centre: float = Field(5e-4, ge=0, description="weight of the centre loss")
    attention: float = Field(1.0, ge=0, description="weight of the loss that turns attention from erased frames")
    label_smoothing: float = Field(0.1, ge=0, lt=1)
    negative_classes: float = Field(1.0, ge=0, le=1, description="share of them in a step's softmax; needs sharded")
    triplet_margin: float | None = Field(None, ge=0, description="margin; default the soft margin")
    centre_rate: float = Field(0.5, ge=0, description="learning rate of the class centres")
    compare: Literal["batch", "lane"] = Field("batch", description="clips of the batch, or of each of data.lanes")
    centres: Literal["all", "released"] = Field("all", description="released: one local table, never learnt")


class OptimizerConfig(Section):
    """SGD with momentum (published), or AdamW."""

    name: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(0.008, gt=0)
    bias_lr_factor: float = Field(2.0, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1, description="sgd")
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="adamw")
    weight_decay: float = Field(1e-4, ge=0)


class ScheduleConfig(Section):
    """Cosine learning rate with a linear warm-up, by timm's scheduler."""

    epochs: int = Field(120, ge=1)
    warmup_epochs: int = Field(5, ge=0)
    warmup_lr: float = Field(8e-5, ge=0)
    floor_lr: float = Field(1.6e-5, ge=0)
    steps_per_epoch: int | None = Field(None, ge=1, description="default: every training identity's turn")


class TrainingConfig(Section):
    """The DeepSpeed engine, checkpoints and what is reported."""

    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    casting: Literal["autocast", "engine"] = Field("autocast", description="of operations, or (engine) of weights")
    zero_stage: Literal[0, 1, 2, 3] = Field(1, description="DeepSpeed shards: 1 optimizer, 2 + gradients, 3 + weights")
    deepspeed: str | dict[str, Any] | None = Field(None, description="DeepSpeed's settings: a JSON file or its content")
    # fp32 is exact. By default what DeepSpeed does: under autocast the weights of linear layers and convolutions in the
    # precision that they compute in, all else as it is.
    gradients: Literal["fp32", "bf16"] | None = Field(None, description="what gradients travel in between the ranks")
    accumulation: int = Field(1, ge=1, description="micro-batches a step; the losses still see the whole batch")
    clip_gradient_norm: float = Field(0.0, ge=0, description="0: none")
    class_group: int | None = Field(None, ge=1, description="ranks that share out sharded classes; default all")
    activation_checkpointing: bool = False
    compile: bool = Field(False, description="torch.compile backbone and branches in training steps")
    ema_decay: float | None = Field(None, gt=0, lt=1, description="average of the weights, evaluated and saved")
    vote_every_steps: int = Field(1, ge=1, description="how often the ranks ask each other whether to stop")
    log_every_steps: int = Field(20, ge=1)
    checkpoint_every_steps: int | None = Field(None, ge=1, description="beside those after epochs")
    checkpoint_every_epochs: int = Field(1, ge=1)
    keep_checkpoints: int = Field(2, ge=1, description="newest ones kept, beside the best")
    keep_every_epochs: int | None = Field(None, ge=1, description="also keep each k-th epoch's for ever")
    max_bad_steps: int = Field(20, ge=1, description="steps in a row whose loss is not finite before training stops")
    profile_steps: int = Field(0, ge=0, description="steps that torch.profiler records, from the tenth on")


class EvaluationConfig(Section):
    """How the test split is embedded and judged."""

    every_epochs: int = Field(10, ge=0, description="0: only after the last")
    protocol: Literal["torchreid", "official", "inclusive", "released"] = "torchreid"
    distance: Literal["euclidean", "cosine", "visible"] = Field("euclidean", description="visible: parts by visibility")
    clips: int | None = Field(None, ge=1, description="evenly spaced clips of each tracklet; default all its frames")
    clips_per_batch: int = Field(16, ge=1, description="of each rank")
    rerank: bool = Field(False, description="k-reciprocal re-ranking")
    pictures: int = Field(8, ge=0, description="queries in the ranked picture, of each kind (best, worst, random)")


class TrackingConfig(Section):
    """Who is told of a run; see keyreid/tracking."""

    sinks: tuple[Literal["mlflow"], ...] = Field(("mlflow",), description="empty: the event log in the run's folder")
    uri: str | None = Field(None, description="MLflow server or store; default SQLite in the output folder")
    experiment: str = "keyreid"
    system_metrics: bool = True


class Config(Section):
    """All of one run."""

    name: str = Field("run", pattern=NAME, description="names the run and its folder")
    output: str = Field("runs", description="folder that holds the runs and the MLflow store")
    seed: int = Field(1234, ge=0, lt=2**63)
    data: DataConfig
    clip: ClipConfig = ClipConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def run_dir(self) -> Path:
        """The folder of this run: configuration, checkpoints, logs, pictures."""
        return Path(self.output).expanduser() / self.name

    @property
    def scopes(self) -> int:
        """Parts of a batch whose clips are compared with each other; see keyreid/distributed/share.py."""
        return self.data.lanes if self.loss.compare == "lane" else 1

    def check_ranks(self, ranks: int, nodes: int | None = None) -> None:
        """Raise ConfigError unless a step's clips divide over the ranks (of each node) and micro-batches."""
        micro = self.training.accumulation
        if self.data.batch_size % (ranks * (nodes or 1) * micro):
            who = f"{nodes} nodes x {ranks} ranks" if nodes else f"{ranks} ranks"
            raise ConfigError(f"{who} x {micro} micro-batches do not divide {self.data.batch}")

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if self.data.batch_size % (micro := self.training.accumulation):
            raise ValueError(f"training.accumulation={micro} does not divide {self.data.batch}")
        if self.data.identities % self.data.lanes:
            raise ValueError(f"data.lanes={self.data.lanes} does not divide data.identities={self.data.identities}")
        for path in (self.output, self.data.shards, self.data.cache_dir, self.model.weights or ""):
            try:
                Path(path).expanduser()
            except RuntimeError:
                raise ValueError(f"{path}: nobody here has this home directory") from None
        return self


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, merge and check a configuration file.

    Args:
        path: the YAML file; one that comes with keyreid may be named from any folder (`configs/mars.yaml`).
        overrides: `section.key=value` strings, values in YAML (`data.augment.erase_area=[0.02,0.3]`).

    Raises:
        ConfigError: a file is missing or not YAML, a key is unknown (with the nearest known one), a value is wrong.
    """
    return load_section(Config, path, overrides)


def load_section(section: type[SectionType], path: str | Path, overrides: Sequence[str] = ()) -> SectionType:
    """`load_config` for a file of another type, such as a search."""
    return check_config(merge_overrides(_read_with_parents(path), overrides), str(path), section)


def merge_overrides(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Values with `section.key=value` strings merged into them, not yet checked."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not value.strip():
            raise ConfigError(f"override {text[:80]!r} is not of the form section.key=value (null for nothing)")
        values = with_value(values, key, plain_yaml.parse(value, f"override {text[:80]!r}"))
    return values


def with_value(values: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Values with one more under a dotted key; a mapping changes what is below it."""
    names = key.split(".")
    if len(names) > plain_yaml.DEEPEST or not all(re.fullmatch(r"[\w-]+", name) for name in names):
        raise ConfigError(f"{key[:80]!r} is no key: write section.key")
    for name in reversed(names):
        value = {name: value}
    return _merged(values, value)


def check_config(values: Any, source: str, section: type[SectionType] = Config) -> SectionType:
    """Type and check merged values; `source` names them in errors."""
    try:
        return section.model_validate(settled(values, section))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    except pydantic.ValidationError as error:
        faults = [_explain(each, section) for each in error.errors()[:FAULTS_LISTED]]
        more = [f"and {error.error_count() - FAULTS_LISTED} more"] * (error.error_count() > FAULTS_LISTED)
        raise ConfigError(f"{source}: " + "; ".join(faults + more)) from None


def save_config(config: Config, path: Path) -> None:
    """Write the resolved configuration; `load_config` reads it back as it was."""
    replace_text(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _read_with_parents(name: str | Path, folder: Path = Path(), children: tuple[Path, ...] = ()) -> dict[str, Any]:
    named = f", named by `extends` in {children[-1]}" if children else ""
    try:
        path = own_or_shipped(Path(name).expanduser(), folder).resolve()
        if path in children:
            raise ConfigError(f"{children[-1]}: `extends` goes in a circle through {path}")
        values = plain_yaml.read(path)
    except (OSError, RuntimeError) as error:  # no such home, links in a circle
        what = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else f"{name}: {error}"
        raise ConfigError(f"{what}{named}") from None
    if not isinstance(values, dict):
        what = type(getattr(values, "value", values)).__name__
        raise ConfigError(f"{path}: a configuration is a mapping of sections, this is {what}")
    parent = values.pop("extends", None)
    parent = parent.text if isinstance(parent, plain_yaml.Scalar) else parent
    if parent is None:
        return values
    if not isinstance(parent, str) or len(children) > plain_yaml.DEEPEST:
        raise ConfigError(f"{path}: `extends` names one file, and of these there are at most {plain_yaml.DEEPEST}")
    return _merged(_read_with_parents(parent, path.parent, (*children, path)), values)


def _merged(below: Any, above: Any) -> Any:
    """Mappings joined key by key; of anything else, what is above."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


def settled(value: Any, kind: Any) -> Any:
    """Scalars as text where the type wants text, else as what they mean."""
    if isinstance(value, plain_yaml.Scalar):
        return value.text if str in (kind, *get_args(kind)) else value.value
    if isinstance(value, str) and "${" in value:
        raise ConfigError(
            f'{value[:80]!r}: nothing is filled in for ${{}}; write the value (or KEY="$VARIABLE" as an override)'
        )
    if isinstance(value, list):
        return [settled(each, Any) for each in value]
    if not isinstance(value, dict):
        return value
    fields = kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}
    return {key: settled(each, fields[key].annotation if key in fields else Any) for key, each in value.items()}


def _explain(detail: Any, section: type[Section]) -> str:
    """One line for one pydantic error, with the nearest known name for an unknown key."""
    place = ".".join(map(str, detail["loc"]))[:200]
    if detail["type"] == "extra_forbidden":
        near = difflib.get_close_matches(place, _known_keys(section), n=1, cutoff=0.0)[0]
        return f"unknown key {place!r}; the nearest known one is {near!r}"
    message = ": ".join(filter(None, [place, detail["msg"].removeprefix("Value error, ")]))
    return f"{message} (got {repr(detail['input'])[:200]})" if place and detail["type"] != "missing" else message


def _known_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in section.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys
