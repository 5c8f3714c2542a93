"""The vocabulary of the command line: options that several commands have, and the one place where they are checked."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..config import AUTO, Lite3RConfig, Lite3RFields, parse_amount
from ..errors import InputError

if TYPE_CHECKING:
    from ..apply.profile import KeepRatioProfile
    from ..scene.reading import Limits


def _models(incomplete: str) -> list[tuple[str, str]]:
    """Models whose names begin so, for the completion of shells."""
    from ..adapter.plugins import model_entries

    return [(name, entry.summary) for name, entry in model_entries().items() if name.startswith(incomplete)]


def _fields(incomplete: str) -> list[str]:
    """Fields of `Lite3RConfig` that begin so."""
    return [f"{name}=" for name in Lite3RFields.__annotations__ if name.startswith(incomplete)]


def _devices(incomplete: str) -> list[str]:
    import torch

    devices = ["auto", "cpu", *(["cuda"] if torch.cuda.is_available() else []), *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    return [device for device in devices if device.startswith(incomplete)]


def _dtypes(incomplete: str) -> list[str]:
    from ..evaluation.run import DTYPES

    return [name for name in DTYPES if name.startswith(incomplete)]


Model = Annotated[
    str,
    typer.Option("--model", help="Name of the model; `lite3r adapters` lists them.", show_default=False, autocompletion=_models),
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", help="A file or a Hub id; `random` for timing only. By default the published weights.", show_default=False),
]
KeepRatio = Annotated[
    str | None,
    typer.Option(
        "--keep-ratio",
        metavar="R",
        help="Share of the key blocks that attention keeps, the same as --config keep_ratio=..., or a *.json file of ratios by site, as "
        f"calibrate --keep-ratio auto writes it; by default {Lite3RConfig.keep_ratio}.",
        show_default=False,
    ),
]
Config = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        help="A field of Lite3RConfig as name=value, the value in JSON, such as dense_below=0; may be repeated.",
        show_default=False,
        autocompletion=_fields,
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, ...", autocompletion=_devices)]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="Of the computation: auto (bfloat16 on a GPU), float32, bfloat16, float16.", autocompletion=_dtypes),
]
Repeats = Annotated[int, typer.Option("--repeats", min=1, help="Timed runs; the median is printed.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write all numbers here.", show_default=False)]
MaxPixels = Annotated[
    str | None,
    typer.Option(
        "--max-pixels", metavar="N", help="Refuse images and depth maps with more pixels, such as 200M; by default 50M.", show_default=False
    ),
]
MaxBytes = Annotated[
    str | None, typer.Option("--max-bytes", metavar="SIZE", help="Refuse larger files, such as 4GB; by default 2GiB.", show_default=False)
]

Resolution = Annotated[
    int | None,
    typer.Option(min=1, help="Height and width of the images; by default what the model makes of square photographs.", show_default=False),
]

LARGEST_SEED = 2**31 - 1


def config_fields(config: Iterable[str] | None, keep_ratio: str | None = None, *, chooses: bool = False) -> dict[str, Any]:
    """Fields of `Lite3RConfig` from ``--config name=value`` and ``--keep-ratio``; a value that is no JSON is a string.

    Args:
        config, keep_ratio: What was given.
        chooses: Whether the command chooses ratios where they are ``auto``.

    Raises:
        InputError: an item has no ``=``, a field is given twice, ratios are to be chosen by a command that does not, or a file of them
            cannot be read.
        ConfigError: there is no field of that name, or it does not take the value.
    """
    fields: dict[str, Any] = {} if keep_ratio is None else {"keep_ratio": _keep_ratio(keep_ratio)}
    for item in config or ():
        name, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--config takes name=value, such as --config keep_ratio=0.25, got {item!r}")
        if name in fields:
            raise InputError(f"{name} is given twice; one of them is meant")
        try:
            fields[name] = json.loads(value)
        except (ValueError, RecursionError):  # no JSON, a number of thousands of digits, brackets without end
            fields[name] = value
    if Lite3RConfig().replace(**fields).waits and not chooses:
        raise InputError(
            "keep_ratio auto is chosen from photographs by `lite3r calibrate --keep-ratio auto`: give --keep-ratio the keep_ratios.json "
            "that it writes, or a number"
        )
    return fields


def plain_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields as JSON has them: of chosen ratios no more than what they are."""
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in fields.items()}


def _keep_ratio(text: str) -> float | str | KeepRatioProfile:
    """A number, ``auto``, or what the file of that name holds."""
    if text == AUTO:
        return text
    try:
        return float(text)
    except ValueError:
        pass
    if not text.endswith(".json"):
        raise InputError(f"--keep-ratio takes a number in (0, 1], a *.json file of ratios, or, in calibrate, auto, got {text[:80]!r}")
    from ..apply.profile import KeepRatioProfile

    return KeepRatioProfile.load(text)


def lite3r_config(config: Iterable[str] | None, keep_ratio: str | None = None, *, chooses: bool = False, **defaults: Any) -> Lite3RConfig:
    """The configuration of `config_fields`, with other `defaults` than the class has."""
    return Lite3RConfig().replace(**(defaults | config_fields(config, keep_ratio, chooses=chooses)))


def numbers(text: str, option: str) -> list[int]:
    """``2,4,8`` as numbers. Raises `InputError` where they are none."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} takes numbers separated by commas, such as 2,4,8, got {text!r}") from error


def file_limits(max_pixels: str | None, max_bytes: str | None) -> AbstractContextManager[Limits]:
    """A context in which files are read with the limits of ``--max-pixels`` and ``--max-bytes``. Raises as `amount`."""
    from ..scene.reading import limits

    return limits(
        None if max_pixels is None else amount(max_pixels, "--max-pixels"), None if max_bytes is None else amount(max_bytes, "--max-bytes")
    )


def amount(text: str, option: str) -> int:
    """``50000000``, ``200M``, ``1.5GB`` or ``4GiB`` as a number: K, M, G and T are powers of 1000, and with an i of 1024.

    Raises:
        InputError: it is none of these, or less than 1.
    """
    number = parse_amount(text)
    if number is None:
        raise InputError(f"{option} takes a number above 0, such as 50000000, 200M or 4GB, got {text[:80]!r}")
    return number
