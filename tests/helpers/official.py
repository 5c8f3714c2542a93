"""Checkpoints as Lite3R's authors saved them: the names of all tensors, and a small VGGT that has them."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from hosts import AxialRope, Patches, grid_positions
from torch import Tensor, nn

VGGT_NAMES = """
aggregator.{camera_token,register_token}                                                                             1
aggregator.{frame_blocks,global_blocks}.<i>.attn.{lam,proj_lin.weight}                                              24
aggregator.{frame_blocks,global_blocks}.<i>.attn.{qkv,proj,q_norm,k_norm}.{weight,bias}                             24
aggregator.{frame_blocks,global_blocks}.<i>.{norm1,norm2,mlp.fc1,mlp.fc2}.{weight,bias}                             24
aggregator.{frame_blocks,global_blocks}.<i>.{ls1,ls2}.gamma                                                         24
aggregator.patch_embed.blocks.<i>.attn.{lam,proj_lin.weight}                                                        24
aggregator.patch_embed.blocks.<i>.attn.{qkv,proj}.{weight,bias}                                                     24
aggregator.patch_embed.blocks.<i>.{norm1,norm2,mlp.fc1,mlp.fc2}.{weight,bias}                                       24
aggregator.patch_embed.blocks.<i>.{ls1,ls2}.gamma                                                                   24
aggregator.patch_embed.{cls_token,mask_token,pos_embed,register_tokens}                                              1
aggregator.patch_embed.{norm,patch_embed.proj}.{weight,bias}                                                         1
camera_head.empty_pose_tokens                                                                                        1
camera_head.{embed_pose,poseLN_modulation.<i>,pose_branch.fc1,pose_branch.fc2,token_norm,trunk_norm}.{weight,bias}   1
camera_head.trunk.<i>.attn.{lam,proj_lin.weight}                                                                     4
camera_head.trunk.<i>.attn.{qkv,proj}.{weight,bias}                                                                  4
camera_head.trunk.<i>.{norm1,norm2,mlp.fc1,mlp.fc2}.{weight,bias}                                                    4
camera_head.trunk.<i>.{ls1,ls2}.gamma                                                                                4
depth_head.norm.{weight,bias}                                                                                        1
depth_head.projects.<i>.{weight,bias}                                                                                4
depth_head.resize_layers.<i>.{weight,bias}                                                                           3
depth_head.scratch.{layer1_rn,layer2_rn,layer3_rn,layer4_rn}.weight                                                  1
depth_head.scratch.output_conv1.{weight,bias}                                                                        1
depth_head.scratch.output_conv2.<i>.{weight,bias}                                                                    2
depth_head.scratch.{refinenet1,refinenet2,refinenet3,refinenet4}.out_conv.{weight,bias}                              1
depth_head.scratch.{refinenet1,refinenet2,refinenet3}.resConfUnit1.{conv1,conv2}.{weight,bias}                       1
depth_head.scratch.{refinenet1,refinenet2,refinenet3,refinenet4}.resConfUnit2.{conv1,conv2}.{weight,bias}            1
"""

DA3_NAMES = """
backbone.pretrained.blocks.<i>.attn.{q_norm,k_norm}.{weight,bias}                                           16
backbone.pretrained.blocks.<i>.attn.{lam,proj_lin.weight}                                                   24
backbone.pretrained.blocks.<i>.attn.{qkv,proj}.{weight,bias}                                                24
backbone.pretrained.blocks.<i>.{norm1,norm2,mlp.fc1,mlp.fc2}.{weight,bias}                                  24
backbone.pretrained.blocks.<i>.{ls1,ls2}.gamma                                                              24
backbone.pretrained.{camera_token,cls_token,pos_embed}                                                       1
backbone.pretrained.{norm,patch_embed.proj}.{weight,bias}                                                    1
cam_dec.backbone.<i>.{weight,bias}                                                                           2
cam_dec.{fc_fov.<i>,fc_qvec,fc_t}.{weight,bias}                                                              1
cam_enc.{pose_branch.fc1,pose_branch.fc2,token_norm,trunk_norm}.{weight,bias}                                1
cam_enc.trunk.<i>.attn.{lam,proj_lin.weight}                                                                 4
cam_enc.trunk.<i>.attn.{qkv,proj}.{weight,bias}                                                              4
cam_enc.trunk.<i>.{norm1,norm2,mlp.fc1,mlp.fc2}.{weight,bias}                                                4
cam_enc.trunk.<i>.{ls1,ls2}.gamma                                                                            4
head.norm.{weight,bias}                                                                                      1
head.projects.<i>.{weight,bias}                                                                              4
head.resize_layers.<i>.{weight,bias}                                                                         3
head.scratch.{layer1_rn,layer2_rn,layer3_rn,layer4_rn}.weight                                                1
head.scratch.output_conv1.{weight,bias}                                                                      1
head.scratch.output_conv1_aux.<i>.<i>.{weight,bias}                                                         20
head.scratch.output_conv2.<i>.{weight,bias}                                                                  2
head.scratch.output_conv2_aux.<i>.<i>.{weight,bias}                                                         12
head.scratch.{refinenet1,refinenet2,refinenet3,refinenet4}{,_aux}.out_conv.{weight,bias}                     1
head.scratch.{refinenet1,refinenet2,refinenet3}{,_aux}.resConfUnit1.{conv1,conv2}.{weight,bias}              1
head.scratch.{refinenet1,refinenet2,refinenet3,refinenet4}{,_aux}.resConfUnit2.{conv1,conv2}.{weight,bias}   1
"""


def listed(text: str) -> Counter[str]:
    """How many tensors there are of each name, indices written ``<i>``."""
    found: Counter[str] = Counter()
    for line in text.strip().splitlines():
        pattern, count = line.split()
        parts = [part.split(",") if i % 2 else [part] for i, part in enumerate(re.split(r"[{}]", pattern))]
        for name in map("".join, itertools.product(*parts)):
            found[name] += int(count)
    return found


def patterns(names: Iterable[str]) -> Counter[str]:
    """The same of the names of a state dict."""
    return Counter(re.sub(r"(?<=\.)\d+(?=\.)", "<i>", name) for name in names)


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, rope: nn.Module | None = None, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm, self.k_norm = (nn.LayerNorm(dim // num_heads) if qk_norm else nn.Identity() for _ in range(2))
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)
        self.rope = rope

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(2, 0).transpose(2, 3)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, pos), self.rope(k, pos)
        return self.proj(self.mix(q, k, v).transpose(1, 2).flatten(2))

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class DeployedAttention(_Attention):
    """As the authors deployed it: dense, plus the linear branch over all tokens through one map for all heads."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        features = [F.elu(x) + 1 for x in (q, k)]
        weights = features[0] @ features[1].mT
        linear = weights @ v / (weights.sum(-1, keepdim=True) + 1e-6)
        return super().mix(q, k, v) + torch.einsum("bhnd,ed->bhne", linear, self.proj_lin.weight)


class _LayerScale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, rope: nn.Module | None = None, qk_norm: bool = False) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = _Attention(dim, num_heads, rope, qk_norm)
        self.ls1, self.ls2 = _LayerScale(dim), _LayerScale(dim)
        self.mlp = _Mlp(dim, 2 * dim, dim)

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x), pos))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _Dinov2(nn.Module):
    num_register_tokens, patch_size = 4, 14

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.cls_token, self.register_tokens = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.randn(1, 4, dim))
        self.pos_embed, self.mask_token = nn.Parameter(torch.randn(1, 1, dim)), nn.Parameter(torch.zeros(1, dim))
        self.patch_embed = Patches(14, dim)
        self.blocks = nn.ModuleList(_Block(dim, 1) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images) + self.pos_embed
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), self.register_tokens.expand(len(x), -1, -1), x), 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 5:]


class _Aggregator(nn.Module):
    patch_size, patch_start_idx = 14, 5

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.patch_embed = _Dinov2(dim, depth)
        self.camera_token, self.register_token = nn.Parameter(torch.randn(1, 2, 1, dim)), nn.Parameter(torch.randn(1, 2, 4, dim))
        self.rope = AxialRope("base_frequency")
        self.frame_blocks, self.global_blocks = (
            nn.ModuleList(_Block(dim, 1, self.rope, qk_norm=True) for _ in range(depth)) for _ in range(2)
        )

    def forward(self, images: Tensor) -> Tensor:
        batch, views, _, height, width = images.shape
        special = torch.cat((self.camera_token, self.register_token), 2)
        special = torch.cat((special[:, :1], special[:, 1:].expand(-1, views - 1, -1, -1)), 1).expand(batch, -1, -1, -1)
        x = torch.cat((special.flatten(0, 1), self.patch_embed(images.flatten(0, 1))), 1)
        pos = grid_positions(batch * views, height // 14, width // 14, 5)
        for frame, across in zip(self.frame_blocks, self.global_blocks, strict=True):
            own = frame(x, pos)
            x = across(own.unflatten(0, (batch, views)).flatten(1, 2), pos.unflatten(0, (batch, views)).flatten(1, 2))
            x = x.unflatten(1, (views, -1)).flatten(0, 1)
        return torch.cat((own, x), -1).unflatten(0, (batch, views))


class _CameraHead(nn.Module):
    """Refines poses in four rounds, from one token a view."""

    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.empty_pose_tokens = nn.Parameter(torch.zeros(1, 1, 9))
        self.embed_pose = nn.Linear(9, dim)
        self.poseLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 3 * dim))
        self.adaln_norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.token_norm, self.trunk_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.trunk = nn.Sequential(*(_Block(dim, 1) for _ in range(depth)))
        self.pose_branch = _Mlp(dim, dim // 2, 9)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = self.token_norm(tokens)
        pose = self.empty_pose_tokens.expand(*tokens.shape[:2], -1)
        for _ in range(4):
            shift, scale, gate = self.poseLN_modulation(self.embed_pose(pose)).chunk(3, -1)
            x = tokens + gate * (self.adaln_norm(tokens) * (1 + scale) + shift)
            pose = pose + self.pose_branch(self.trunk_norm(self.trunk(x)))
        return pose


def _unit(*convs: str) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.Conv2d(1, 1, 1) for name in convs})


class _DepthHead(nn.Module):
    """The parameters of a DPT head; it does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(2)
        self.projects = nn.ModuleList(nn.Conv2d(1, 1, 1) for _ in range(4))
        self.resize_layers = nn.ModuleList(nn.Identity() if i == 2 else nn.Conv2d(1, 1, 1) for i in range(4))
        scratch: dict[str, nn.Module] = {f"layer{i}_rn": nn.Conv2d(1, 1, 1, bias=False) for i in range(1, 5)}
        for i in range(1, 5):
            refine: dict[str, nn.Module] = {"out_conv": nn.Conv2d(1, 1, 1), "resConfUnit2": _unit("conv1", "conv2")}
            scratch[f"refinenet{i}"] = nn.ModuleDict(refine | ({} if i == 4 else {"resConfUnit1": _unit("conv1", "conv2")}))
        scratch |= {
            "output_conv1": nn.Conv2d(1, 1, 1),
            "output_conv2": nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU(), nn.Conv2d(1, 1, 1)),
        }
        self.scratch = nn.ModuleDict(scratch)


class SmallVGGT(nn.Module):
    """Every tensor that VGGT-1B has without its point and track heads, in small: heads of 64, those of the camera head of 128."""

    def __init__(self, depth: int = 24, trunk: int = 4) -> None:
        super().__init__()
        self.aggregator = _Aggregator(64, depth)
        self.camera_head = _CameraHead(128, trunk)
        self.depth_head = _DepthHead()

    def forward(self, images: Tensor) -> Tensor:
        return self.camera_head(self.aggregator(images)[:, :, 0])


def attention_names(model: nn.Module) -> list[str]:
    """Names of the modules in which the authors put a projection."""
    return [name for name, module in model.named_modules() if isinstance(getattr(module, "qkv", None), nn.Linear)]


def official_state(model: nn.Module, scale: float = 0.2) -> dict[str, Tensor]:
    """The state dict that the authors would have saved: the model's, a projection and a dead scalar for each attention."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name in attention_names(model):
        attn = model.get_submodule(name)
        dim = attn.qkv.in_features // attn.num_heads
        state[f"{name}.lam"] = torch.tensor(0.5)
        state[f"{name}.proj_lin.weight"] = scale * torch.randn(dim, dim) / dim**0.5
    return state


def deployed(model: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """`model` as the authors ran it, with their branches."""
    for name in attention_names(model):
        attn = model.get_submodule(name)
        attn.__class__ = DeployedAttention
        attn.proj_lin = nn.Linear(attn.proj.in_features // attn.num_heads, attn.proj.in_features // attn.num_heads, bias=False)
    model.load_state_dict({name: tensor for name, tensor in state.items() if not name.endswith(".lam")})
    return model
