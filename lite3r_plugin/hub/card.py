"""The card of a checkpoint on the Hub: what it is, how to load it, under which licence, and what was measured under which conditions.

There is no speed on it: what is fast depends on the machine, and a number without its quality misleads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..adapter.downloads import is_hub_id
from ..errors import InputError, plural, short
from ..scene.metrics.bootstrap import LEAST_SCENES
from ..version import __version__
from .metrics import Metrics, Row

CARD_NAME = "README.md"
LIBRARY = "lite3r-plugin"
TASK, TASK_NAME = "image-to-3d", "depth, pose and points from several views"

BODY = """# {name}

A [Lite3R](https://arxiv.org/abs/2605.11354) checkpoint: sparse-linear attention for {model} ({sites}), written by lite3r-plugin {version}.
{holds}

```python
from lite3r_plugin import load_lite3r

model = load_lite3r(model, "{repository}"){comment}
```

Base model: {base}. The licence of its weights holds for what was derived from them.

## Quality

{quality}

## Configuration

```json
{config}
```
"""


def make_card(record: Mapping[str, Any], repository: str, license_id: str, base_model: str, metrics: Metrics | None) -> str:
    """The text of the card, with the metadata that the Hub reads in front.

    Args:
        record: What the JSON file of the checkpoint says.
        repository: Where it goes.
        license_id: As the Hub names licences.
        base_model: Hub id of the dense model, or what it is in words.
        metrics: What was measured, or None.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        license=license_id,
        library_name=LIBRARY,
        base_model=base_model if is_hub_id(base_model) else None,
        tags=["lite3r", "sparse-attention", "3d-reconstruction"],
        model_name=repository.split("/")[1],
        eval_results=None if metrics is None else _results(metrics),
    )
    fields = record["config"]
    text = BODY.format(
        name=repository.split("/")[1],
        model=record["model"],
        sites=f"sites: {sum(bool(site.get('sparse')) for site in record['sites'].values())}, adapter `{record['adapter']}`",
        version=__version__,
        holds=_holds(record),
        repository=repository,
        comment="  # on the meta device, too" if record["whole"] else "  # the dense model, with the weights of the base model",
        base=f"[{base_model}](https://huggingface.co/{base_model})" if is_hub_id(base_model) else base_model,
        quality="Nothing was measured." if metrics is None else _quality(metrics),
        config=json.dumps(fields, indent=1),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{text}"


def read_card(path: Path) -> dict[str, Any]:
    """The metadata of a card.

    Raises:
        InputError: the file cannot be read, or its metadata is no YAML.
    """
    from huggingface_hub import metadata_load

    try:
        data = metadata_load(path)
    except Exception as error:  # of the system, of the text, of the parser
        raise InputError(f"{path} cannot be read as a model card ({short(error, 100)}); mend it or take it away") from error
    return data if isinstance(data, dict) else {}


def _holds(record: Mapping[str, Any]) -> str:
    branches = sum(name.endswith(".proj_lin.weight") for name in record["tensors"])
    parts = [f"the linear branches ({branches})"] if branches else []
    if record["fp8"]:
        parts.append(f"the FP8 weights of {plural(len(record['fp8']), 'Linear')}")
    if record["whole"]:
        parts.append("all other weights of the model")
    return f"It holds {' and '.join(parts) or 'the configuration alone'}."


def _quality(metrics: Metrics) -> str:
    lines = [
        f"Measured with `lite3r eval` on {_code(metrics.data)}: {plural(metrics.scenes, 'scene')}, {metrics.views}. "
        f"{_sparse(metrics.density)} "
        + (
            "The very files of this repository were measured."
            if metrics.of_these_files
            else "Those who pushed it say so, of a model with this configuration."
        ),
        "",
        "| | dense | Lite3R | difference [95 %] |",
        "|---|---|---|---|",
        *(
            f"| {row.name} {'↑' if row.larger_is_better else '↓'} | {row.dense:.4g} | {row.lite3r:.4g} | {_difference(row)} |"
            for row in metrics.rows
        ),
        "",
        f"Means over scenes, one scale a scene; paired differences, with an interval from {LEAST_SCENES} scenes on. Conditions: "
        + ", ".join(f"{name} {_code(value)}" for name, value in metrics.conditions.items())
        + ".",
    ]
    return "\n".join(lines)


def _sparse(density: float) -> str:
    if density == 1:
        return "Nothing was sparse in these runs: attention computed all blocks, so they say nothing of sparsity."
    return f"{density:.1%} of the blocks of attention were computed at the sparse sites."


def _difference(row: Row) -> str:
    if row.interval is None:
        return f"{row.lite3r - row.dense:+.4g}"
    return f"{row.interval.difference:+.4g} [{row.interval.low:+.4g}, {row.interval.high:+.4g}]"


def _results(metrics: Metrics) -> list[Any]:
    from huggingface_hub import EvalResult

    fields = metrics.fields
    return [
        EvalResult(
            task_type=TASK, task_name=TASK_NAME, dataset_type=_slug(metrics.data.partition(":")[0]), dataset_name=metrics.data,
            dataset_split=fields.get("split"), metric_type=row.field, metric_name=row.name, metric_value=row.lite3r,
            metric_args={"views": fields["views"], "dense": row.dense},
        )
        for row in metrics.rows
    ]  # fmt: skip


def _slug(text: str) -> str:
    return re.sub(r"\W+", "-", text.lower()).strip("-") or "data"


def _code(value: Any) -> str:
    return f"`{' '.join(str(value).replace('`', '').split())}`"
