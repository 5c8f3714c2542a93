"""The testbed model: a small alternating-attention multi-view transformer in the shape of VGGT (arXiv 2503.11651)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ConfigError, InputError
from ..files import replacing
from .cameras import decode_pose
from .heads import CameraHead, DenseHead
from .layers import AxialRope, Block, PatchStem

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
SHIPPED = Path(__file__).parent / "weights"


@dataclasses.dataclass(frozen=True)
class TestbedConfig:
    """Sizes of a `Testbed`.

    Attributes:
        dim: Width C of the tokens.
        depth: Number of pairs of a frame block and a global block.
        head_dim: D; ``dim`` is a multiple of it.
        mlp_ratio: Width of the MLP over ``dim``.
        registers: Register tokens a view, beside the camera token.
        stem: Width of the first convolution; a multiple of 8.
        rope_base: Base of the rotary embedding.
        layer_scale: Gain of the residual branches at the start of training.

    Raises:
        ConfigError: the sizes do not fit together.
    """

    dim: int = 384
    depth: int = 6
    head_dim: int = 64
    mlp_ratio: float = 2.0
    registers: int = 4
    stem: int = 64
    rope_base: float = 100.0
    layer_scale: float = 0.3

    __test__ = False  # not a test case, whatever its name says

    def __post_init__(self) -> None:
        if self.dim <= 0 or self.dim % self.head_dim or self.head_dim % 4:
            raise ConfigError(f"dim must be a multiple of head_dim, and that of 4, got {self.dim} and {self.head_dim}")
        if self.depth < 1 or self.registers < 0 or self.stem < 8 or self.stem % 8:
            raise ConfigError(f"depth >= 1, registers >= 0 and stem a multiple of 8 are needed, got {self}")


class Aggregator(nn.Module):
    """Tokens of all views: blocks that look at one view alternate with blocks that look at all.

    The children have the names that VGGT gives them, so whatever knows VGGT by its structure knows this too.
    """

    def __init__(self, config: TestbedConfig) -> None:
        super().__init__()
        self.patch_size = PatchStem.patch_size
        self.patch_start_idx = 1 + config.registers
        self.patch_embed = PatchStem(config.dim, config.stem)
        # [first view or another, token, C]
        self.camera_token = nn.Parameter(torch.randn(2, 1, config.dim) * 0.02)
        self.register_token = nn.Parameter(torch.randn(2, config.registers, config.dim) * 0.02)
        self.first_view = nn.Parameter(torch.randn(config.dim) * 0.02)
        rope = AxialRope(config.rope_base)

        def blocks() -> nn.ModuleList:
            args = (config.dim, config.head_dim, config.mlp_ratio, config.layer_scale, rope)
            return nn.ModuleList(Block(*args) for _ in range(config.depth))

        self.frame_blocks = blocks()
        self.global_blocks = blocks()

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """images: ``[B, S, 3, H, W]`` in [0, 1].

        Returns the tokens after each pair of blocks, ``[B, S, P, 2C]`` (frame block beside global block; camera token
        first, then registers, then patches), and the stem's fine features ``[B * S, F, H/4, W/4]``.
        """
        batch, views, _, height, width = images.shape
        patches, fine = self.patch_embed(images.flatten(0, 1))
        other = (torch.arange(views, device=images.device) > 0).long()
        special = torch.cat((self.camera_token, self.register_token), 1)[other]  # [S, special, C]
        patches = patches.unflatten(0, (batch, views)) + (other == 0)[:, None, None] * self.first_view
        x = torch.cat((special.expand(batch, -1, -1, -1).to(patches.dtype), patches), 2)
        pos = self._positions(height // self.patch_size, width // self.patch_size, images.device)
        tokens = x.shape[2]
        frame_pos = pos.expand(batch * views, -1, -1)
        global_pos = pos.repeat(1, views, 1).expand(batch, -1, -1)
        outputs = []
        for frame_block, global_block in zip(self.frame_blocks, self.global_blocks, strict=True):
            in_frame = frame_block(x.reshape(batch * views, tokens, -1), pos=frame_pos).reshape(x.shape)
            x = global_block(in_frame.reshape(batch, views * tokens, -1), pos=global_pos).reshape(x.shape)
            outputs.append(torch.cat((in_frame, x), -1))
        return outputs, fine

    def _positions(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """Row and column of the tokens of a view, ``[1, P, 2]``; special tokens are at 0, patches start at 1."""
        row = torch.arange(1, rows + 1, device=device).repeat_interleave(columns)
        column = torch.arange(1, columns + 1, device=device).repeat(rows)
        special = torch.zeros(self.patch_start_idx, 2, device=device, dtype=row.dtype)
        return torch.cat((special, torch.stack((row, column), -1)))[None]


class Testbed(nn.Module):
    """Depth, points and cameras of a few views of a static scene, in one forward pass.

    The scale of a scene is not known: the outputs are in units of its mean point distance from the first camera.

    Args:
        config: Sizes, `TestbedConfig()` by default.
    """

    __test__ = False  # not a test case, whatever its name says

    def __init__(self, config: TestbedConfig | None = None) -> None:
        super().__init__()
        self.config = config or TestbedConfig()
        dim, layer_scale = self.config.dim, self.config.layer_scale
        self.aggregator = Aggregator(self.config)
        fine = self.aggregator.patch_embed.fine_dim
        self.camera_head = CameraHead(2 * dim, dim, self.config.head_dim, layer_scale)
        self.depth_head = DenseHead(2 * dim, fine, channels=2)
        self.point_head = DenseHead(2 * dim, fine, channels=4)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """images: ``[B, S, 3, H, W]`` in [0, 1], H and W multiples of `PatchStem.patch_size`.

        Returns a dict of
            depth: ``[B, S, H, W]`` along the optical axis; depth_conf: ``[B, S, H, W]``, > 1, higher is surer;
            points: ``[B, S, H, W, 3]`` in the first camera's frame; points_conf: ``[B, S, H, W]``;
            pose_enc: ``[B, S, 9]`` (see `cameras`); world_to_camera: ``[B, S, 3, 4]``; intrinsics: ``[B, S, 3, 3]``.

        Raises:
            InputError: the images have another shape.
        """
        patch = self.aggregator.patch_size
        if images.dim() != 5 or images.shape[2] != 3 or images.shape[3] % patch or images.shape[4] % patch:
            raise InputError(f"images are [B, S, 3, H, W] with H and W multiples of {patch}, got {list(images.shape)}")
        return self.decode(*self.aggregator(images))

    def decode(self, outputs: list[Tensor], fine: Tensor) -> dict[str, Tensor]:
        """The heads: from the aggregator's results to `forward`'s."""
        last = outputs[-1]
        batch, views = last.shape[:2]
        patch, start = self.aggregator.patch_size, self.aggregator.patch_start_idx
        grid = (fine.shape[2] * 4 // patch, fine.shape[3] * 4 // patch)
        height, width = grid[0] * patch, grid[1] * patch
        patches = last[:, :, start:].flatten(0, 1)
        depth, depth_conf = self.depth_head(patches, fine, grid).unflatten(0, (batch, views)).unbind(2)
        points = self.point_head(patches, fine, grid).unflatten(0, (batch, views))
        pose_enc = self.camera_head(last[:, :, 0])
        world_to_camera, intrinsics = decode_pose(pose_enc, height, width)
        return {
            "depth": depth.clamp(-8, 8).exp(),
            "depth_conf": 1 + depth_conf.clamp(max=8).exp(),
            "points": signed_expm1(points[:, :, :3].permute(0, 1, 3, 4, 2)),
            "points_conf": 1 + points[:, :, 3].clamp(max=8).exp(),
            "pose_enc": pose_enc,
            "world_to_camera": world_to_camera,
            "intrinsics": intrinsics,
        }

    def save_pretrained(self, directory: str | Path) -> None:
        """Write ``model.safetensors`` (FP16) and ``config.json`` into `directory`, each at once or not at all."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: value.detach().half().contiguous().cpu() for name, value in self.state_dict().items()}
        with replacing(directory / WEIGHTS_NAME) as part:
            save_file(weights, part)
        with replacing(directory / CONFIG_NAME) as part:
            part.write_text(json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, path: str | Path | None = None, device: torch.device | str = "cpu") -> Testbed:
        """A trained model in eval mode, with FP32 weights.

        Args:
            path: A folder that `save_pretrained` wrote; by default the weights that come with the package.
            device: Where to put it.

        Raises:
            InputError: the folder has no weights, or they are damaged or of another model.
        """
        directory = Path(path) if path is not None else SHIPPED
        try:
            fields: dict[str, Any] = json.loads((directory / CONFIG_NAME).read_text())
            weights = load_file(directory / WEIGHTS_NAME)
            model = cls(TestbedConfig(**fields))
            model.load_state_dict({name: value.float() for name, value in weights.items()})
        except FileNotFoundError as error:
            train = "accelerate launch -m lite3r_plugin.testbed.train --out DIR"
            raise InputError(
                f"no testbed weights in {directory}; pass a folder that save_pretrained wrote, or make one with `{train}`"
            ) from error
        except (ConfigError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
            raise InputError(f"the testbed weights in {directory} cannot be read: {error}") from error
        return model.to(device).eval()


def weights_hash(model: nn.Module) -> str:
    """The first digits of the SHA-256 of all parameters and buffers, so that results of other weights are told apart."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def signed_expm1(x: Tensor) -> Tensor:
    """``sign(x) * (exp(|x|) - 1)``: near and far coordinates from values of similar size."""
    return x.sign() * torch.expm1(x.abs().clamp(max=8))
