"""What the JSON of shards must say: asked once where it is read, so that no reader stumbles over what was forged."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, create_model


def _form(**fields: Any) -> type[BaseModel]:
    """An object with these entries, and any others; a tuple is an optional entry's type and default."""
    required = {name: kind if isinstance(kind, tuple) else (kind, ...) for name, kind in fields.items()}
    return create_model("Form", __config__=ConfigDict(strict=True), **required)


_NUMBER = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]  # what the arrays of an index can hold
_COUNT = Annotated[int, Field(ge=0, lt=1 << 63)]
_NAME = Annotated[str, Field(max_length=4096)]
_COUNTS = _form(tracklets=_COUNT, frames=Annotated[_COUNT, Field(gt=0)], identities=_COUNT)
_SHARD = _form(file=str, index=str, sha256=str, index_sha256=str, bytes=_COUNT, index_bytes=_COUNT)

CARD = _form(
    **{"name": str, "tool": str, "source": _form(dataset=str, folder=str, options=dict[str, Any])},
    settings=_form(image=str, keypoints=str, heatmaps=_form(**{"from": str})),
    counts=create_model("Counts", __base__=_COUNTS, frames_with_keypoints=(_COUNT, ...), heatmap_bytes=(_COUNT, ...)),
    by_split=dict[str, _COUNTS],
    cameras=list[_NUMBER],
    splits=list[_form(train=list[_NUMBER], test=list[_NUMBER])],
    query_camera=_NUMBER | None,
    names=(dict[str, dict[str, _NUMBER]], {}),
    frames_per_second=(dict[str, FiniteFloat], {}),
    shards=Annotated[list[_SHARD], Field(min_length=1)],
)
INDEX = _form(shard=str, bytes=_COUNT, sha256=str, parts=_COUNT, settings=str)
TRACKLET = _form(
    **{"key": str, "identity": _NUMBER | None, "camera": _NUMBER, "split": str, "frames": _COUNT},
    source=_form(file=_NAME) | _form(files=Annotated[list[_NAME], Field(min_length=1)]),
    video_frames=(Annotated[list[_NUMBER], Field(min_length=1)] | None, None),
)


def check(form: type[BaseModel], values: Any) -> dict[str, Any]:
    """The same values, or ValueError that names what is missing or of another type."""
    try:
        form.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:80]
        raise ValueError(f"{where!r} is missing or no value that fits: {first['msg']}") from None
    return values
