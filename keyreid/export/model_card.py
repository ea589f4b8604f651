"""The model card that is written beside every export: what the network is, how good, and what it must not do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

import keyreid
from keyreid.evaluation.protocols import PROTOCOLS
from keyreid.export.source import ExportSource
from keyreid.files import replace_text, sha256

SHOWN_TRAINING = ("loss", "optimizer", "schedule")
SHOWN_RATES = ("mAP", "mINP", "rank1", "rank5", "rank10")

TEMPLATE = """\
# Model card: {{ name }}

A network that turns a short sequence of pictures of one person (a tracklet) into a vector, so that sequences of the
same person are near each other: KeyRe-ID ([arXiv 2507.07393](https://arxiv.org/abs/2507.07393)), trained and exported
with keyreid {{ version }}.

| file | bytes | SHA-256 |
|---|---|---|
{% for file in files -%}
| `{{ file.name }}` | {{ file.bytes }} | `{{ file.sha256 }}` |
{% endfor %}
## Network

- backbone {{ model.backbone }}{% if model.depth %}, {{ model.depth }} blocks{% endif %}, \
{{ "%.1f"|format(parameters / 1e6) }} M parameters{% if averaged %}, averaged over training (EMA){% endif %}
- input: clips of {{ clip.frames }} frames of {{ clip.height }} x {{ clip.width }} pixels, RGB, with the heatmaps of \
{{ model.parts }} body parts ({{ parts }})
- guidance `{{ model.guidance }}`; camera embedding for {{ cameras }} cameras; other cameras count as unknown
- output: a vector of {{ width }} numbers, of which the first {{ global_width }} are the global feature; compare by
  Euclidean distance; a tracklet's vector is the mean over its clips

## Data

{% if training %}- data set `{{ about.dataset or "unknown" }}`, shards `{{ training.data.shards }}`, \
split {{ training.data.split_number }}{% if training.data.holdout %}, {{ training.data.holdout }} of the training \
identities held out{% endif %}
{% else %}- data set `{{ about.dataset or "unknown" }}`
{% endif -%}
- {{ identities }} training identities, {{ cameras }} cameras
- initial weights of the backbone: {{ initial }}
- the data's own licence and its subjects' consent bind whoever uses these weights; check them before passing these on

## Scores

{% if scores -%}
Test split of `{{ scores.dataset }}`; every number is of the protocol named beside it, and numbers of different
protocols cannot be compared.

| protocol | {% for rate in rates %}{{ rate }} | {% endfor %}valid queries | gallery |
|---|{% for rate in rates %}---|{% endfor %}---|---|
{% for name, values in scores.protocols.items() -%}
| {{ name }} | {% for rate in rates %}{{ "%.2f %%"|format(100 * values[rate]) }} | {% endfor -%}
{{ values.valid_queries }} of {{ values.queries }} | {{ values.gallery }} |
{% endfor %}
{% for name in scores.protocols -%}
- `{{ name }}`: {{ summaries[name] }}
{% endfor -%}
- distance {{ scores.distance }}{% if scores.rerank %}, re-ranked{% endif %}
{% else -%}
This checkpoint was not evaluated. Do so before you rely on it: `keyreid evaluate FILE --shards SHARDS`.
{% endif %}
## Training

{% if training -%}
{% if about.step %}Step {{ about.step }} of run `{{ about.run }}`, seed {{ training.seed }}. {% endif -%}
Batch {{ training.data.identities }} identities x {{ training.data.tracklets }} tracklets, precision
{{ training.training.precision }}.

| setting | value |
|---|---|
{% for section in shown -%}
{% for key, value in training[section].items() -%}
| {{ section }}.{{ key }} | {{ value }} |
{% endfor -%}
{% endfor %}
{% else -%}
The configuration of the training is not known\
{% if about.converted_from %}: converted from `{{ about.converted_from }}`{% endif %}.
{% endif %}
## Limits

- It compares clothes, build and gait, not faces: people who dress alike are confused, and a change of clothes hides a
  person. Over days it is of little use.
- A small distance is a suggestion for a person to check, never an identification. Ranks say which gallery entry is
  nearest, also when the person sought is not in the gallery at all.
- Scores fall on cameras, places, seasons, picture sizes and detectors unlike those of the training data, and may differ
  between groups of people. The scores above say nothing about that: measure on your own labelled data.
- Without keypoints the local branch is not guided. Crops with several people, or with most of the body hidden, give
  vectors of little meaning; `visibility` says which parts were seen.

## Intended use

Research on person re-identification, and review by people of recordings that they may lawfully search.

Re-identifying people in recordings is surveillance. Whoever uses this answers for it, and must know before the first
search: which law allows it (in many places biometric or behavioural tracking needs a legal basis, a documented impact
assessment, information of those recorded, limits on storage, and is forbidden for remote identification in public); for
which stated purpose; who looks at the results and how a mistake is found and undone; when pictures and vectors are
deleted. Vectors are personal data just as the pictures are.

Not for: decisions about a person without a human who checks them; covert tracking of individuals; singling people out
by ethnicity, religion, health, opinion or the like; identifying people in public places in real time.
{% if usage %}
## How to use

```sh
{{ usage }}
```
{% endif -%}
"""


def write_card(path: Path, source: ExportSource, files: Sequence[Path], usage: str = "") -> None:
    """Write the model card of an export.

    Args:
        files: what was exported.
        usage: commands that show how to use it.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    text = environment.from_string(TEMPLATE).render(_facts(path, source, files, usage))
    replace_text(path, text)


def card_path(exported: Path) -> Path:
    """FILE.card.md, beside the export."""
    return exported.with_name(f"{exported.name}.card.md")


def _facts(path: Path, source: ExportSource, files: Sequence[Path], usage: str) -> dict[str, Any]:
    from keyreid.pose.parts import part_names

    header, tensors = source.header, source.tensors
    width = tensors["global_neck.weight"].numel()
    about = {"dataset": None, "run": None, "step": None, "converted_from": None, **header.about}
    learnt = [
        tensor for name, tensor in tensors.items() if not name.endswith(("running_mean", "running_var", "tracked"))
    ]
    initial = (source.training.get("model") or {}).get("weights") if source.training else header.model.weights
    return {
        "name": _name(about, source.file),
        "version": keyreid.__version__,
        "files": [{"name": f.name, "bytes": f.stat().st_size, "sha256": sha256(f)} for f in files],
        "model": header.model,
        "clip": header.clip,
        "parameters": sum(tensor.numel() for tensor in learnt),
        "averaged": source.averaged,
        "parts": ", ".join(part_names(header.model.parts)),
        "cameras": len(header.cameras),
        "identities": len(header.identities),
        "width": width + tensors["part_necks.weight"].numel(),
        "global_width": width,
        "about": about,
        "training": source.training,
        "shown": [section for section in SHOWN_TRAINING if section in source.training],
        "initial": f"`{initial}`" if initial else "random, or not known",
        "scores": source.scores,
        "rates": SHOWN_RATES,
        "summaries": {name: protocol.summary for name, protocol in PROTOCOLS.items()},
        "usage": usage,
    }


def _name(about: Mapping[str, Any], file: Path) -> str:
    if about["run"] is None:
        return file.stem
    return f"{about['run']}, step {about['step']}" if about["step"] else str(about["run"])
