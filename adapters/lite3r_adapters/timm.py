"""timm: plain ViT, DINOv2, DINOv3, EVA-02, Perception Encoder, SigLIP and other models with its self-attention modules."""

from __future__ import annotations

from typing import Any

from torch import nn

from lite3r_plugin.adapter import AttentionSite, ExactRewrite, Routed, TokenSource, forward_parameters, hookimpl

_ARGUMENTS = {"x", "rope", "attn_mask", "is_causal"}
_PARAMETERS = {"q_bias", "v_bias"}  # others, such as a table of relative positions, mean that attention gets a bias


@hookimpl(trylast=True)
def lite3r_attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every timm self-attention module inside `model`."""
    modules: dict[str, Any] = dict(model.named_modules())
    sites = []
    for name, module in modules.items():
        if _is_attention(module):
            sites.append(AttentionSite(name, "frame", _head_dim(module), Routed(module.num_heads), _tokens(modules, name)))
    return sites or None


@hookimpl(trylast=True)
def lite3r_exact_rewrites(model: nn.Module) -> list[ExactRewrite] | None:
    """None is known, and none is needed: these models run in BF16 as they are, and nothing in them waits for the GPU."""
    return [] if any(map(_is_attention, model.modules())) else None


def _is_attention(module: Any) -> bool:
    """`Attention`, `AttentionRope` or `EvaAttention` by structure, so that vendored copies are known too."""
    return (
        hasattr(module, "fused_attn")
        and isinstance(getattr(module, "num_heads", None), int)
        and isinstance(getattr(module, "proj", None), nn.Module)
        and isinstance(_head_dim(module), int)
        and any(isinstance(getattr(module, name, None), nn.Module) for name in ("qkv", "q_proj"))
        and {name for name, _ in module.named_parameters(recurse=False)} <= _PARAMETERS
        and (arguments := forward_parameters(module)) is not None
        and arguments.keys() <= _ARGUMENTS
    )


def _head_dim(module: Any) -> Any:
    """None where it is not known: in timm 1.0.20 an `EvaAttention` does not keep it."""
    joined = getattr(module.proj, "in_features", None)
    return getattr(module, "head_dim", None if joined is None else joined // module.num_heads)


def _tokens(modules: dict[str, Any], name: str) -> TokenSource | None:
    """Tokens of the innermost vision transformer around the module `name`; None where they are not prefix plus grid."""
    while name:
        name = name.rpartition(".")[0]
        vit = modules[name]
        patches, special = getattr(vit, "patch_embed", None), getattr(vit, "num_prefix_tokens", None)
        if isinstance(patches, nn.Module) and isinstance(special, int):
            conv = getattr(patches, "proj", None)
            drops_patches = getattr(getattr(vit, "patch_drop", None), "prob", 0) > 0
            if not isinstance(conv, nn.Conv2d) or conv.kernel_size != conv.stride or drops_patches:
                return None
            # The convolution, not the patch embedding, which may pad the image first.
            return TokenSource(f"{name}.patch_embed.proj".lstrip("."), (conv.stride[0], conv.stride[1]), special, strict=False)
    return None
