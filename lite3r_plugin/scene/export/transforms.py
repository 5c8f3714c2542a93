"""nerfstudio's ``transforms.json``, which names images, their cameras and a cloud to start from."""

from __future__ import annotations

from typing import Any

import torch

from .reconstruction import Reconstruction


def transforms(scene: Reconstruction, images: str, cloud: str | None) -> dict[str, Any]:
    """The content of the file.

    Poses are camera to world in OpenGL's axes (x right, y up, z backward); the world is the prediction's own, so that its points fit.

    Args:
        scene: The scene.
        images: The folder of `lite3r_plugin.scene.export.colmap.write_images`, relative to the file.
        cloud: The PLY file of the points, relative to the file; None: there is none.

    Raises:
        InputError: a camera is none.
    """
    pose, intrinsics = scene.cameras()
    height, width = scene.prediction.depth.shape[1:]
    inverse = torch.linalg.inv(torch.cat((pose, pose.new_tensor([0, 0, 0, 1.0]).expand(len(pose), 1, 4)), 1))
    to_world = inverse @ torch.diag(pose.new_tensor([1, -1, -1, 1]))
    frames = [
        {
            "file_path": f"{images}/{name}",
            "fl_x": K[0, 0].item(), "fl_y": K[1, 1].item(), "cx": K[0, 2].item(), "cy": K[1, 2].item(), "w": width, "h": height,
            "transform_matrix": matrix.tolist(),
        }
        for name, K, matrix in zip(scene.image_names, intrinsics, to_world, strict=True)
    ]  # fmt: skip
    start = {} if cloud is None else {"ply_file_path": cloud}
    return {"camera_model": "PINHOLE", **start, "frames": frames}
