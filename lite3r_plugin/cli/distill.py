"""`lite3r distill`: train what a configuration file says, on one process or many, and save what `load_lite3r` takes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import ConfigError, shown

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from torch import nn

    from ..adapter.models import ModelEntry
    from ..config import Lite3RConfig
    from ..training.config import DistillConfig
    from ..training.scenes import SceneSamples

MODEL_FOLDER = "model"
TABLES: dict[str, dict[str, tuple[type | tuple[type, ...], Any]]] = {  # the kind of each key, and what it is by default
    "model": {"name": (str, None), "weights": (str, None), "device": (str, "auto"), "config": (dict, {}), "calibrate": (int, 16)},
    "data": {
        "source": (str, None), "split": (str, None), "views": (int, 8), "size": ((int, list), None), "rule": (str, "spread"),
        "draws": (int, 8), "scenes": (int, None), "seed": (int, 0),
    },
    "output": {"dir": (str, None), "convert": (bool, False)},
}  # fmt: skip
TABLES["validation"] = TABLES["data"]


def distill(
    config_file: Annotated[Path, typer.Argument(help="A TOML file with the tables model, data, distill, output.", show_default=False)],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from what is in the output folder.")] = False,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of DistillConfig as name=value, the value in JSON; may be repeated.", show_default=False),
    ] = None,
) -> None:
    """Distil a model with Lite3R from itself without; also by `accelerate launch -m lite3r_plugin.distill CONFIG.toml`."""
    recipe = Recipe.read(config_file, _fields(set_) | ({"resume": True} if resume else {}))
    recipe.run()


@dataclass(frozen=True)
class Recipe:
    """What a configuration file says, checked.

    Attributes:
        model, data, output: Its tables, with defaults.
        validation: That table, or None.
        config: Its table ``distill``, with `dir` of the table ``output``.
        lite3r: `config` of the table ``model``.
    """

    model: dict[str, Any]
    data: dict[str, Any]
    validation: dict[str, Any] | None
    output: dict[str, Any]
    config: DistillConfig
    lite3r: Lite3RConfig

    @classmethod
    def read(cls, path: Path, fields: Mapping[str, Any]) -> Recipe:
        """The file at `path`, with `fields` of `DistillConfig` on top.

        Raises:
            ConfigError: it cannot be read, is no TOML, lacks something, or holds something unknown or wrong.
        """
        from ..config import Lite3RConfig
        from ..training.config import DistillConfig, read_toml

        content = read_toml(path)
        if unknown := sorted(set(content) - {*TABLES, "distill"}):
            raise ConfigError(f"{path}: unknown {shown(unknown)}; the tables are model, data, validation, distill and output")
        for name, key in (("model", "name"), ("data", "source"), ("output", "dir")):
            if key not in (content.get(name) or {}):
                raise ConfigError(f"{path}: the table [{name}] with {key} is missing")
        tables = {name: _table(path, name, content[name]) for name in TABLES if name in content}
        try:
            lite3r = Lite3RConfig().replace(**tables["model"]["config"])
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        config = DistillConfig.from_toml(path, **{"output_dir": tables["output"]["dir"], **fields})
        return cls(tables["model"], tables["data"], tables.get("validation"), tables["output"], config, lite3r)

    def run(self) -> None:
        """Build, train, fold in, convert if wanted, and save."""
        from accelerate import PartialState

        machines = PartialState()
        try:
            self._run(machines)
        finally:
            if machines.num_processes > 1:  # a process that ends with its group may abort
                machines.destroy_process_group()

    def _run(self, machines: PartialState) -> None:
        from ..adapter.plugins import find_model
        from ..apply.checkpoint import save_lite3r
        from ..apply.verbs import apply_lite3r, convert
        from ..evaluation import quiet
        from ..training.checkpoint import check_folder
        from ..training.distill import distill as train
        from .show import say

        entry = find_model(self.model["name"])
        entry.require_library()
        check_folder(Path(self.output["dir"]), self.config.resume)
        labels = any(self.config.weight("task"))
        data = _samples(self.data, entry, labels)
        validation = None if self.validation is None else _samples(self.validation, entry, labels)
        with quiet():
            model = entry.build(self.model["weights"], self._device())
        apply_lite3r(model, self.lite3r)
        self._calibrate(model, data)
        result = train(model, data, self.config, validation=validation)
        if not machines.is_main_process:
            return
        learned_more = self.config.trainable != "proj"
        if self.config.trainable == "proj+lora":
            from ..peft import merge_lora

            merge_lora(model)
        if self.output["convert"]:
            convert(model)
        folder = Path(self.output["dir"]) / MODEL_FOLDER
        save_lite3r(model, folder, whole=learned_more)
        say(str(result))
        kind = "the whole model" if learned_more else "what Lite3R added to the model"
        say(f"wrote {folder}, {kind}: load_lite3r(model, {str(folder)!r})")

    def _calibrate(self, model: nn.Module, data: SceneSamples) -> None:
        """Start from linear branches in closed form, unless there are none or a run goes on. The same in every process."""
        import contextlib

        import torch
        from accelerate import PartialState

        from ..training.calibrate import calibrate
        from ..training.checkpoint import saved_step
        from .show import say

        count = min(self.model["calibrate"], len(data))
        goes_on = self.config.resume and saved_step(Path(self.output["dir"])) is not None
        if count < 2 or goes_on or self.lite3r.linear_branch == "none":
            return
        device = next(model.parameters()).device
        half = self.config.mixed_precision == "bf16"
        with torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext():
            result = calibrate(model, (data[i].to(device).inputs for i in range(count)))
        if PartialState().is_main_process:
            say(str(result))

    def _device(self) -> torch.device:
        from accelerate import PartialState

        from ..evaluation import choose_device

        machines = PartialState()
        if machines.num_processes > 1 and machines.device is not None:
            return machines.device
        return choose_device(self.model["device"])


def _samples(table: Mapping[str, Any], entry: ModelEntry, labels: bool) -> SceneSamples:
    from ..scene.data import open_scenes
    from ..training.scenes import SceneSamples

    found = open_scenes(table["source"], table["split"])
    found = found if table["scenes"] is None else found[: table["scenes"]]
    size = table["size"]
    size = (size, size) if isinstance(size, int) else tuple(size) if size else None
    return SceneSamples(entry, found, table["views"], size, table["rule"], table["seed"], table["draws"], labels)


def _table(path: Path, name: str, given: Any) -> dict[str, Any]:
    kinds = TABLES[name]
    if not isinstance(given, Mapping):
        raise ConfigError(f"{path}: {name} is a table, [{name}], got {shown(given)}")
    if unknown := sorted(set(given) - set(kinds)):
        raise ConfigError(f"{path}: [{name}] has unknown {shown(unknown)}; it takes {', '.join(kinds)}")
    for key, value in given.items():
        kind, _ = kinds[key]
        wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if (
            wrong
            or (key in ("views", "draws", "scenes") and value < 1)
            or (key == "calibrate" and value < 0)
            or (key == "size" and not _is_size(value))
        ):
            raise ConfigError(f"{path}: [{name}] {key} cannot be {shown(value)}")
    return {key: given.get(key, default) for key, (_, default) in kinds.items()}


def _is_size(value: Any) -> bool:
    sides = value if isinstance(value, list) else [value, value]
    return len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)


def _fields(items: list[str] | None) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not equals:
            raise ConfigError(f"--set takes name=value, such as --set steps=1000, got {item!r}")
        try:
            fields[name] = json.loads(value)
        except (ValueError, RecursionError):
            fields[name] = value
    return fields
