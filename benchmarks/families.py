"""What Lite3R does to the vision models of transformers: a small one of each is built, applied to, converted and run.

python benchmarks/families.py                  # writes docs/families.md
python benchmarks/families.py swin dinov2      # prints some
"""

from __future__ import annotations

import copy
import inspect
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lite3r_plugin import apply_lite3r, describe
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.errors import NoSitesError, UnknownModelError, short
from lite3r_plugin.ops.dispatch import SlowPathWarning
from lite3r_plugin.testing import TEST_CONFIG

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
HEADING = "## Families of transformers"
MOST_PARAMETERS = 40_000_000

SMALL = {
    "hidden_size": 32, "d_model": 32, "embed_dim": 32, "num_hidden_layers": 2, "encoder_layers": 1, "decoder_layers": 1,
    "num_attention_heads": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "intermediate_size": 48, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "vocab_size": 99, "image_size": 64, "patch_size": 8, "num_queries": 5, "depth": 2, "num_heads": 2,
    "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 48,
}  # fmt: skip


@dataclass(frozen=True)
class Small:
    """A small model of a family, with random weights.

    Attributes:
        model: It, in eval mode.
        run: Runs the model that it is given.
    """

    model: nn.Module
    run: Callable[[nn.Module], Any]


@dataclass(frozen=True)
class Row:
    """What was seen of a family.

    Attributes:
        family: The ``model_type``.
        attention: ``"sparse"``, ``"sparse in part"``, ``"left to the host"`` or ``"not known"``.
        why: Why calls were left to the host, or the model was not taken.
        fused: Whether the site runs more of its module than attention itself.
        fp8: Linears in FP8, where nothing is sparse.
        failed: What went wrong: never to be seen.
    """

    family: str
    attention: str
    why: str = ""
    fused: bool = False
    fp8: int = 0
    failed: str = ""


def _images(model: nn.Module) -> Any:
    config: Any = model.config
    size = getattr(config, "image_size", 64)
    size = size if isinstance(size, int) else size[0]
    frames = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    return torch.rand(1, frames, 3, size, size) if frames else torch.rand(1, 3, size, size)


def _swin(hf: Any, stages: int = 2) -> Any:
    names = [f"stage{i + 1}" for i in range(stages)]
    depths, heads = [2] * stages, [2] * stages
    return hf.SwinConfig(image_size=64, patch_size=4, embed_dim=16, depths=depths, num_heads=heads, window_size=4, out_features=names)


def _of_images(model: nn.Module, **inputs: Any) -> Small:
    inputs = inputs or {"pixel_values": _images(model)}
    return Small(model.eval(), lambda m: m(**inputs))


def _written(hf: Any) -> dict[str, Callable[[], Small]]:
    """Families that need more than small numbers, by ``model_type``."""
    vit = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=64, patch_size=8)

    def mask2former() -> Small:
        sizes = dict(hidden_dim=32, feature_size=32, mask_feature_size=32, num_queries=5, encoder_layers=1, decoder_layers=2)
        more = dict(num_attention_heads=2, dim_feedforward=48, encoder_feedforward_dim=48)
        config = hf.Mask2FormerConfig(backbone_config=_swin(hf, 4), **sizes, **more)
        return _of_images(hf.Mask2FormerForUniversalSegmentation(config), pixel_values=torch.rand(1, 3, 64, 64))

    def qwen() -> Small:
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel

        sizes = dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32)
        config = Qwen2_5_VLVisionConfig(**sizes, patch_size=14, spatial_merge_size=2, window_size=56, fullatt_block_indexes=[1])
        config._attn_implementation = "sdpa"
        patches, grid = torch.rand(64, 3 * 2 * 14 * 14), torch.tensor([[1, 8, 8]])
        return Small(Qwen2_5_VisionTransformerPretrainedModel(config).eval(), lambda m: m(patches, grid_thw=grid))

    def eomt() -> Small:
        config = hf.EomtConfig(**{**vit, "num_hidden_layers": 3}, num_queries=5, num_blocks=1, num_upscale_blocks=1)
        return _of_images(hf.EomtForUniversalSegmentation(config), pixel_values=torch.rand(1, 3, 64, 64))

    def siglip2() -> Small:
        config = hf.Siglip2VisionConfig(**{k: v for k, v in vit.items() if k != "image_size"}, num_patches=64)
        inputs = dict(pixel_values=torch.rand(1, 64, 3 * 8 * 8), spatial_shapes=torch.tensor([[8, 8]]))
        return _of_images(hf.Siglip2VisionModel(config), **inputs, pixel_attention_mask=torch.ones(1, 64, dtype=torch.long))

    def pixtral() -> Small:
        return _of_images(
            hf.PixtralVisionModel(hf.PixtralVisionConfig(**vit)), pixel_values=torch.rand(1, 3, 64, 64), image_sizes=[(64, 64)]
        )

    def beit() -> Small:
        return _of_images(hf.BeitModel(hf.BeitConfig(**vit, use_relative_position_bias=True)))

    def vjepa2() -> Small:
        more = dict(crop_size=64, frames_per_clip=4, pred_hidden_size=48, pred_num_attention_heads=2, pred_num_hidden_layers=1)
        return _of_images(hf.VJEPA2Model(hf.VJEPA2Config(**vit, **more)), pixel_values_videos=torch.rand(1, 4, 3, 64, 64))

    def swin() -> Small:
        return _of_images(hf.SwinModel(_swin(hf)))

    return {
        "swin": swin, "mask2former": mask2former, "qwen2_5_vl_vision": qwen, "eomt": eomt, "beit": beit,
        "siglip2_vision_model": siglip2, "pixtral": pixtral, "vjepa2": vjepa2,
    }  # fmt: skip


def families() -> list[str]:
    """Every ``model_type`` of the installed transformers whose model takes images, and attends through SDPA; and those written here."""
    import transformers as hf
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    found = dict.fromkeys(_written(hf))
    for family, names in MODEL_MAPPING_NAMES.items():
        try:
            kind = getattr(hf, names if isinstance(names, str) else names[0])
            takes_images = str(kind.main_input_name).startswith("pixel_values") and kind._supports_sdpa
        except (ImportError, AttributeError):  # needs a library that is not here
            continue
        if takes_images:
            found[family] = None
    return list(found)


def build(family: str) -> Small | str:
    """A small model of the family; why there is none where it wants more than small numbers or more than images."""
    import transformers as hf
    from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

    torch.manual_seed(0)
    try:
        if family in (written := _written(hf)):
            small = written[family]()
        else:
            names = MODEL_MAPPING_NAMES[family]
            kind = getattr(hf, names if isinstance(names, str) else names[0])
            config = kind.config_class(**_shrunk(kind.config_class()))
            with torch.device("meta"):
                count = sum(parameter.numel() for parameter in kind(config).parameters())
            if count > MOST_PARAMETERS:
                return f"{count / 1e6:.0f} million parameters at the smallest size known here"
            model = kind(config)
            small = _of_images(model, **_inputs(model))
        with torch.no_grad():
            small.run(small.model)
    except Exception as error:  # whatever a configuration of numbers that do not fit leads to
        return short(error, 90)
    for parameter in small.model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return small


def _inputs(model: Any) -> dict[str, Any]:
    names, config, name = inspect.signature(model.forward).parameters, model.config, model.main_input_name
    if "grid_thw" not in names:
        return {name: _images(model)}
    width = 3 * getattr(config, "temporal_patch_size", 1) * config.patch_size**2  # patches in rows, of an image of 8 x 8
    return {name: torch.rand(64, width), "grid_thw": torch.tensor([[1, 8, 8]])}


def _shrunk(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            values[name] = {"model_type": value.model_type, **_shrunk(value)}
        elif name in SMALL and type(value) is int:
            values[name] = SMALL[name]
        elif name in ("image_size", "patch_size") and isinstance(value, (list, tuple)):
            values[name] = type(value)([SMALL[name]] * len(value))
    return values


def look(family: str, small: Small) -> Row:
    """What Lite3R does to the model."""
    sparse, converted = copy.deepcopy(small.model), copy.deepcopy(small.model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", SlowPathWarning)
        try:
            apply_lite3r(sparse, TEST_CONFIG)
        except (UnknownModelError, NoSitesError):
            return Row(family, "not known")
        try:
            small.run(sparse)
            report = describe(sparse)
            apply_lite3r(converted, precision="fp8", exclude=("*",))
            small.run(converted)
        except Exception as error:
            return Row(family, "", failed=short(error))
    ran, left = (sum(getattr(site.calls, name) for site in report.sites) for name in ("sparse", "host"))
    why = dict.fromkeys(site.calls.reason or "" for site in report.sites if site.calls.host)
    attention = "left to the host" if not ran else "sparse in part" if left else "sparse"
    fused = any(module.style.replaces for module in lite3r_modules(sparse).values())
    fp8 = sum(count for kind, count in describe(converted).linears.items() if kind.startswith("in FP8"))
    return Row(family, attention, "; ".join(filter(None, why)), fused, fp8)


def walk(names: list[str]) -> tuple[list[Row], dict[str, str]]:
    """Rows of the families that could be built, and why the others could not."""
    rows: list[Row] = []
    missing: dict[str, str] = {}
    for family in names:
        small = build(family)
        if isinstance(small, str):
            missing[family] = small
        else:
            rows.append(look(family, small))
    return rows, missing


def page(rows: list[Row], missing: dict[str, str]) -> str:
    """The part of the page that begins with `HEADING`. What is above it is written by hand."""
    import transformers

    lines = [
        HEADING,
        "",
        f"What Lite3R does to the vision models of transformers {transformers.__version__} that attend through SDPA: one small model of",
        "each, with random weights, was built, applied to, converted to FP8 and run by `python benchmarks/families.py`. *Left to the host*",
        "means that the attention runs dense in the model's own code, for the reason that `describe` gives; FP8 serves those too.",
        "",
        "| family | attention | fused | Linears in FP8 | why not sparse |",
        "|---|---|---|---|---|",
        *(
            f"| {r.family} | {r.attention} | {'yes' if r.fused else 'no'} | {'yes' if r.fp8 else 'no'} | {r.why} |"
            for r in sorted(rows, key=lambda r: r.family)
            if r.attention != "not known"
        ),
        "",
        "No adapter knows the attention of these, and `apply_lite3r` refuses them: "
        + ", ".join(sorted(r.family for r in rows if r.attention == "not known"))
        + ".",
        "",
        "Of these no small model is built here, since they need more than images or more than small numbers: "
        + ", ".join(sorted(missing))
        + ".",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the page, or print what is asked for."""
    rows, missing = walk(sys.argv[1:] or families())
    for row in rows:
        print(row)
    for family, why in missing.items():
        print(f"not built: {family}: {why}")
    if failed := [row for row in rows if row.failed]:
        raise SystemExit(f"{len(failed)} families failed: {', '.join(row.family for row in failed)}")
    if not sys.argv[1:]:
        PAGE.write_text(PAGE.read_text().partition(HEADING)[0] + page(rows, missing))


if __name__ == "__main__":
    main()
