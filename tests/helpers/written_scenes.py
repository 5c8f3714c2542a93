"""Procedural scenes written in the layouts of data sets, as those files look."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lite3r_plugin.scene.data.maps import write_pfm
from lite3r_plugin.scene.procedural import ProcScenes, TextureBank, covisibility

Sample = dict[str, Tensor]


def render(views: int = 4, height: int = 48, width: int = 64, seed: int = 3) -> Sample:
    """One scene with small steps between its cameras, without the batch dimension; depth is 0 where unknown."""
    scenes = ProcScenes(TextureBank.procedural(12, 32, seed=0), seed=seed, augment=False, arcs=(0.35,))
    sample = scenes(1, views, height, width)
    assert sample["ok"].all()
    sample["depth"] = sample["depth"] * sample["valid"]
    return {name: value[0] for name, value in sample.items()}


def write_layout(sample: Sample, layout: str, path: Path) -> Path:
    """Write `sample` and return the folder to open."""
    path.mkdir(parents=True, exist_ok=True)
    WRITERS[layout](sample, path)
    return path


def camera_text(K: np.ndarray, pose: np.ndarray) -> str:
    rows = [" ".join(map(repr, row)) for row in np.vstack([pose, [0, 0, 0, 1]]).tolist()]
    return "\n".join(["extrinsic", *rows, "", "intrinsic", *(" ".join(map(repr, row)) for row in K.tolist()), "", "0.5 0.02 128 3.06", ""])


def pair_text(sample: Sample) -> str:
    shares = covisibility({name: value[None] for name, value in sample.items()}, step=4)[0]
    lines = [str(len(shares))]
    for i, row in enumerate(shares):
        others = [j for j in row.argsort(descending=True).tolist() if j != i]
        lines += [str(i), " ".join([str(len(others)), *(f"{j} {row[j]:.4f}" for j in others)])]
    return "\n".join(lines) + "\n"


def _views(sample: Sample) -> list[tuple[int, Image.Image, np.ndarray, np.ndarray, Tensor]]:
    """Number, image, intrinsics, world to camera and depth of each view."""
    parts = zip(sample["rgb"], sample["K"].double().numpy(), sample["w2c"].double().numpy(), sample["depth"], strict=True)
    return [
        (i, Image.fromarray((rgb * 255).round().byte().permute(1, 2, 0).numpy()), K, pose, depth)
        for i, (rgb, K, pose, depth) in enumerate(parts)
    ]


def _folders(path: Path, *names: str) -> list[Path]:
    for name in names:
        (path / name).mkdir(parents=True)
    return [path / name for name in names]


def _blendedmvs(sample: Sample, path: Path) -> None:
    images, cams, depths = _folders(path, "scene/blended_images", "scene/cams", "scene/rendered_depth_maps")
    for i, image, K, pose, depth in _views(sample):
        image.save(images / f"{i:08d}.jpg", quality=98, subsampling=0)
        image.convert("L").save(images / f"{i:08d}_masked.jpg")
        (cams / f"{i:08d}_cam.txt").write_text(camera_text(K, pose))
        write_pfm(depths / f"{i:08d}.pfm", depth)
    (cams / "pair.txt").write_text(pair_text(sample))


def _dtu(sample: Sample, path: Path) -> None:
    images, cams = _folders(path, "scan1/images", "scan1/cams")
    for i, image, K, pose, _ in _views(sample):
        image.save(images / f"{i:08d}.png")
        (cams / f"{i:08d}_cam.txt").write_text(camera_text(K, pose))
    (path / "scan1" / "pair.txt").write_text(pair_text(sample))


def _dtu_training(sample: Sample, path: Path) -> None:
    cams, depths, images = _folders(path, "Cameras/train", "Depths/scan2_train", "Rectified/scan2_train")
    for i, image, K, pose, depth in _views(sample):
        image.save(images / f"rect_{i + 1:03d}_3_r5000.png")
        (cams / f"{i:08d}_cam.txt").write_text(camera_text(np.diag([0.25, 0.25, 1]) @ K, pose))
        write_pfm(depths / f"depth_map_{i:04d}.pfm", depth[2::4, 2::4])
        Image.fromarray(np.uint8(depth[2::4, 2::4] > 0) * 255).save(depths / f"depth_visual_{i:04d}.png")
    (path / "Cameras" / "pair.txt").write_text(pair_text(sample))


def _dtu_idr(sample: Sample, path: Path) -> None:
    images, masks = _folders(path, "scan24/image", "scan24/mask")
    matrices = {}
    for i, image, K, pose, depth in _views(sample):
        image.save(images / f"{i:06d}.png")
        Image.fromarray(np.uint8(depth > 0) * 255).convert("RGB").save(masks / f"{i:03d}.png")
        centred_at_whole_numbers = K - np.array([[0, 0, 0.5], [0, 0, 0.5], [0, 0, 0]])
        matrices[f"world_mat_{i}"] = np.vstack([centred_at_whole_numbers @ pose, [0, 0, 0, 1]])
        matrices[f"scale_mat_{i}"] = np.diag([2.0, 2, 2, 1])
    np.savez(path / "scan24" / "cameras_sphere.npz", **matrices)


def _seven_scenes(sample: Sample, path: Path) -> None:
    (folder,) = _folders(path, "kitchen/seq-01")
    for i, image, _, pose, depth in _views(sample):
        image.save(folder / f"frame-{i:06d}.color.png")
        millimetres = (depth * 1000).round().numpy().astype(np.uint16)
        Image.fromarray(np.where(millimetres == 0, 65535, millimetres).astype(np.uint16)).save(folder / f"frame-{i:06d}.depth.png")
        np.savetxt(folder / f"frame-{i:06d}.pose.txt", np.linalg.inv(np.vstack([pose, [0, 0, 0, 1]])), fmt="%.7e", delimiter="\t")
    np.savetxt(folder / "camera-intrinsics.txt", sample["K"][0].double().numpy())
    (path / "kitchen" / "TestSplit.txt").write_text("sequence1\n")


def _strecha(sample: Sample, path: Path) -> None:
    images, cams = _folders(path, "fountain/images", "fountain/gt_dense_cameras")
    for i, image, K, pose, _ in _views(sample):
        image.save(images / f"{i:04d}.png")
        rows = [*K, np.zeros(3), *pose[:, :3].T, -pose[:, :3].T @ pose[:, 3]]
        text = "\n".join(" ".join(map(repr, row.tolist())) + " " for row in rows) + f"\n{image.width} {image.height}\n"
        (cams / f"{i:04d}.png.camera").write_text(text)


def _quaternion(R: np.ndarray) -> np.ndarray:
    """(w, x, y, z): the eigenvector that the rotation's quadratic form has for its largest eigenvalue."""
    trace = np.trace(R)
    form = np.empty((4, 4))
    form[0, 0], form[1:, 1:] = trace, R + R.T - trace * np.eye(3)
    form[0, 1:] = form[1:, 0] = R[2, 1] - R[1, 2], R[0, 2] - R[2, 0], R[1, 0] - R[0, 1]
    return np.linalg.eigh(form)[1][:, -1]


def _colmap(sample: Sample, path: Path, binary: bool) -> None:
    images, model, depths = _folders(path, "images", "sparse/0", "stereo/depth_maps")
    views = _views(sample)
    height, width = sample["depth"].shape[1:]
    cameras_text, images_text = ["# Camera list"], ["# Image list"]
    cameras_data, images_data = [struct.pack("<Q", len(views))], [struct.pack("<Q", len(views))]
    for i, image, K, pose, depth in reversed(views):
        name, camera = f"view {i}.png", 10 + i
        image.save(images / name)
        header = f"{width}&{height}&1&".encode()
        (depths / f"{name}.geometric.bin").write_bytes(header + depth.numpy().astype("<f4").tobytes())
        parameters = (K[0, 0], K[1, 1], K[0, 2], K[1, 2])
        numbers = (*_quaternion(pose[:, :3]), *pose[:, 3])
        cameras_text.append(f"{camera} PINHOLE {width} {height} " + " ".join(map(repr, map(float, parameters))))
        images_text += [f"{i + 1} " + " ".join(map(repr, map(float, numbers))) + f" {camera} {name}", "1.5 2.5 -1" if i % 2 else ""]
        cameras_data.append(struct.pack("<IiQQ4d", camera, 1, width, height, *parameters))
        points = struct.pack("<Qddq", 1, 1.5, 2.5, -1) if i % 2 else struct.pack("<Q", 0)
        images_data.append(struct.pack("<I7dI", i + 1, *numbers, camera) + name.encode() + b"\0" + points)
    if binary:
        (model / "cameras.bin").write_bytes(b"".join(cameras_data))
        (model / "images.bin").write_bytes(b"".join(images_data))
    else:
        (model / "cameras.txt").write_text("\n".join(cameras_text) + "\n")
        (model / "images.txt").write_text("\n".join(images_text) + "\n")


def _nerfstudio(sample: Sample, path: Path) -> None:
    images, depths = _folders(path, "images", "depth")
    frames = []
    height, width = sample["depth"].shape[1:]
    for i, image, K, pose, depth in _views(sample):
        image.save(images / f"frame_{i}.png")
        Image.fromarray((depth * 1000).round().numpy().astype(np.uint16)).save(depths / f"frame_{i}.png")
        camera_to_world = np.linalg.inv(np.vstack([pose, [0, 0, 0, 1]])) @ np.diag([1.0, -1, -1, 1])
        frame = {"file_path": f"images/frame_{i}.png", "depth_file_path": f"depth/frame_{i}.png"}
        frame |= {"fl_x": K[0, 0], "fl_y": K[1, 1], "cx": K[0, 2], "cy": K[1, 2], "transform_matrix": camera_to_world.tolist()}
        frames.append(frame)
    content = {"camera_model": "OPENCV", "w": width, "h": height, "k1": 0.0, "p1": 0, "frames": frames}
    (path / "transforms.json").write_text(json.dumps(content, indent=1))


def _images(sample: Sample, path: Path) -> None:
    for i, image, *_ in _views(sample):
        image.save(path / f"{i}.png")


WRITERS: dict[str, Callable[[Sample, Path], None]] = {
    "blendedmvs": _blendedmvs,
    "dtu": _dtu,
    "dtu-training": _dtu_training,
    "dtu-idr": _dtu_idr,
    "7scenes": _seven_scenes,
    "strecha": _strecha,
    "colmap": lambda sample, path: _colmap(sample, path, binary=True),
    "colmap-text": lambda sample, path: _colmap(sample, path, binary=False),
    "nerfstudio": _nerfstudio,
    "images": _images,
}


def inverted(sample: Sample) -> Sample:
    """The mistake that loaders make: camera to world where world to camera belongs."""
    R, t = sample["w2c"].split((3, 1), -1)
    return {**sample, "w2c": torch.cat((R.mT, -R.mT @ t), -1)}
