"""A live page through viser: the same as the page that is a file, for large scenes and for programs that add to it."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from ...errors import InputError, short, shown
from .glb import extent
from .page import upright
from .point_cloud import point_cloud
from .reconstruction import Facts, Reconstruction

if TYPE_CHECKING:
    import viser


def check_viewer(host: str) -> None:
    """Raise `InputError` where no live page can be served: viser is not installed, or this machine cannot listen at `host`."""
    if importlib.util.find_spec("viser") is None:
        raise InputError(
            "the live page needs viser: pip install 'lite3r-plugin[viewer]'; or write a page that needs nothing, --out scene.html"
        )
    try:  # viser waits for ever for a server that could not start
        family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.bind(address)
    except (OSError, UnicodeError) as error:  # of a name that is too long
        raise InputError(
            f"nothing can be served at the host {shown(host)} ({short(error)}); 127.0.0.1 is for this machine alone, 0.0.0.0 lets others in"
        ) from error


def live_page(runs: Mapping[str, Reconstruction], facts: Facts, host: str = "127.0.0.1", port: int = 8080) -> viser.ViserServer:
    """Serve `runs`, reconstructions of the same views by what they are called, the main one last, until the server is stopped.

    Args:
        runs, facts: What is shown, and told beside it.
        host: Where to listen; ``0.0.0.0`` lets other machines in.
        port: The first one to try.

    Raises:
        InputError: viser is not installed, the host or the port cannot be had, or a run has no valid point or camera.
    """
    check_viewer(host)
    import viser

    clouds = {name: _by_confidence(scene) for name, scene in runs.items()}
    main = list(runs.values())[-1]
    up = upright(main)[1]
    try:
        server = viser.ViserServer(host=host, port=port, label="Lite3R", verbose=False)
    except OSError as error:
        raise InputError(f"nothing can be served at {host}:{port} ({error.strerror}); choose another --port") from error
    server.scene.set_up_direction(tuple(up.tolist()))
    server.gui.add_markdown(_markdown(facts))
    run = server.gui.add_dropdown("run", tuple(runs), initial_value=list(runs)[-1], visible=len(runs) > 1)
    share = server.gui.add_slider("confidence, %", min=1, max=100, step=1, initial_value=round(100 - main.drop_percent))
    size = server.gui.add_slider("size of points", min=0.2, max=4, step=0.1, initial_value=1.0)
    photographs = server.gui.add_checkbox("cameras", True)
    handles = {name: (_add_cloud(server, name, cloud), _add_cameras(server, name, runs[name])) for name, cloud in clouds.items()}

    def refresh(_: Any = None) -> None:
        with server.atomic():
            for name, (cloud, cameras) in handles.items():
                points, colors, radius = clouds[name]
                cloud.visible = name == run.value
                if cloud.visible:
                    count = max(1, round(len(points) * share.value / 100))
                    cloud.points, cloud.colors, cloud.point_size = points[:count], colors[:count], radius * size.value
                for camera in cameras:
                    camera.visible = cloud.visible and photographs.value

    first_look = _first_look(main, up, clouds[list(runs)[-1]][0])

    @server.on_client_connect
    def _(client: viser.ClientHandle) -> None:
        with client.atomic():
            client.camera.up_direction = up.numpy()
            client.camera.position, client.camera.look_at = first_look

    for control in (run, share, size, photographs):
        control.on_update(refresh)
    refresh()
    return server


def _first_look(scene: Reconstruction, up: torch.Tensor, points: Any) -> tuple[Any, Any]:
    """From where and where to: over the shoulders of the photographers, to the middle of the scene."""
    pose, _ = scene.cameras()
    centre = (-pose[:, :, :3].mT @ pose[:, :, 3:])[:, :, 0].mean(0).float()
    middle = torch.from_numpy(points).median(0).values
    size = extent(torch.from_numpy(points))
    back = centre - middle
    eye = middle + back * (1 + 0.35 * size / max(float(back.norm()), 1e-9)) + 0.2 * size * up
    return eye.numpy(), middle.numpy()


def _by_confidence(scene: Reconstruction) -> tuple[Any, Any, float]:
    """Points and colours, the surest first, and the size at which they are drawn."""
    cloud = point_cloud(scene.prediction, 0, scene.max_points)
    assert cloud.pixels is not None
    order = scene.prediction.confidence.flatten()[cloud.pixels].argsort(descending=True, stable=True)
    return cloud.points[order].numpy(), cloud.colors[order].numpy(), 0.0016 * extent(cloud.points)


def _add_cloud(server: Any, name: str, cloud: tuple[Any, Any, float]) -> Any:
    points, colors, radius = cloud
    return server.scene.add_point_cloud(f"/{name}/points", points, colors, point_size=radius)


def _add_cameras(server: Any, name: str, scene: Reconstruction) -> list[Any]:
    from scipy.spatial.transform import Rotation

    pose, intrinsics = scene.cameras()
    height, width = scene.prediction.depth.shape[1:]
    scale = 0.03 * extent(scene.cloud.points)
    found = []
    for i, image in enumerate(scene.prediction.images):
        x, y, z, w = Rotation.from_matrix(pose[i, :, :3].T.numpy()).as_quat()
        position = (-pose[i, :, :3].T @ pose[i, :, 3]).numpy()
        angle = float(2 * torch.atan(height / 2 / intrinsics[i, 1, 1]))
        pixels = (image * 255).round().clamp(0, 255).to(torch.uint8).numpy()[:: max(1, height // 160), :: max(1, height // 160)]
        frustum = server.scene.add_camera_frustum(
            f"/{name}/cameras/{i:04d}", fov=angle, aspect=width / height, scale=scale, thickness=scale / 40, image=pixels,
            wxyz=(w, x, y, z), position=position,
        )  # fmt: skip
        frustum.on_click(lambda event, h=frustum: _stand(event.client, h))
        found.append(frustum)
    return found


def _stand(client: Any, frustum: Any) -> None:
    """Look from where a photograph was taken."""
    with client.atomic():
        client.camera.position, client.camera.wxyz = frustum.position, frustum.wxyz


def _markdown(facts: Facts) -> str:
    lines = [f"**{_plain(facts.title)}**", ""]
    if facts.rows:
        lines += [f"| {' | '.join(map(_plain, row))} |" for row in (facts.columns, *facts.rows)] + [""]
        lines.insert(3, "|" + " --- |" * len(facts.columns))
    return "\n".join([*lines, *(f"{_plain(note)}\n" for note in facts.notes)])


def _plain(text: str) -> str:
    """Text as it is, in Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|!" else " " if c == "\n" else c for c in text)
