"""The testbed, the small trained model that comes with the package; the adapter of VGGT, whose structure it has, finds its sites."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lite3r_plugin.adapter import hookimpl

from . import outputs

if TYPE_CHECKING:
    from torch import nn

    from lite3r_plugin.adapter import ModelEntry, OutputsFunction


@hookimpl
def lite3r_outputs(model: nn.Module) -> OutputsFunction | None:
    """Outputs of a `Testbed`."""
    return outputs.outputs_of(model)


@hookimpl
def lite3r_gathered_modules(model: nn.Module) -> list[str] | None:
    """Heads of cameras of the testbed, which give every view the token of the reference view."""
    return [name for name, module in model.named_modules() if hasattr(module, "trunk") and hasattr(module, "first_view")] or None


@hookimpl
def lite3r_models() -> dict[str, ModelEntry]:
    """``testbed``."""
    from .model import ENTRIES  # needs Pillow, which applying does not

    return ENTRIES
