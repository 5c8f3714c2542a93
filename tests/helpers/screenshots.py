"""The pictures of docs/first_steps.md: its commands are run, and what they show is photographed.

    python tests/helpers/screenshots.py docs/images

It needs Chromium and the extras of the project.
"""

from __future__ import annotations

import html
import io
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from browser import browser_page
from PIL import Image
from torch import Tensor
from videos import write_video

from lite3r_plugin.scene.procedural import furnished_room

PAGE = Path(__file__).parents[2] / "docs" / "first_steps.md"
SIZE = (1200, 760)
COLUMNS = 112


def commands() -> dict[str, str]:
    """The commands of the page, by their first argument."""
    return {line.split()[1]: line for line in re.findall(r"```bash\n(lite3r .+)\n```", PAGE.read_text())}


def film(path: Path, frames: int = 24, size: int = 256) -> Path:
    """Somebody walks through the furnished room."""
    room = furnished_room(frames, size)
    views = (room["rgb"][0].permute(0, 2, 3, 1) * 255).byte().numpy()
    return write_video(path, [views[i] for i in walk(room["w2c"][0])])


def walk(world_to_camera: Tensor) -> list[int]:
    """An order of cameras ``[S, 3, 4]`` in which each is near the one before."""
    centres = -(world_to_camera[:, :, :3].mT @ world_to_camera[:, :, 3:])[..., 0]
    order, left = [0], set(range(1, len(centres)))
    while left:
        nearest = min(left, key=lambda i: float((centres[i] - centres[order[-1]]).norm()))
        order.append(nearest)
        left.remove(nearest)
    return order


def run(command: str, folder: Path) -> str:
    """What a command prints into a terminal of `COLUMNS`, after it."""
    words = [sys.executable, "-m", "lite3r_plugin", *command.split()[1:]]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}  # in the order in which they are shown
    result = subprocess.run(words, cwd=folder, env=os.environ | {"COLUMNS": str(COLUMNS)}, text=True, check=False, **streams)
    assert result.returncode == 0, result.stdout
    return f"$ {command}\n{result.stdout}".replace(str(folder), "/home/you")


def photograph_terminal(text: str, path: Path) -> None:
    """`text` as a terminal shows it."""
    style = "margin:0;padding:18px 22px;background:#16181d;color:#dfe3ea;font:14px/1.35 'DejaVu Sans Mono',monospace;width:max-content"
    with browser_page("about:blank") as (page, _):
        page.set_content(f'<pre style="{style}">{html.escape(text.rstrip())}</pre>')
        page.locator("pre").screenshot(path=path)
    with Image.open(path) as picture:
        picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=32).save(path, optimize=True)


def photograph_page(address: str | Path, path: Path, wait: float = 0) -> list[str]:
    """A page as it opens. Returns what went wrong on it."""
    with browser_page(address, *SIZE) as (page, wrong):
        page.wait_for_timeout(1000 * wait)
        page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        shot = page.screenshot()
    Image.open(io.BytesIO(shot)).convert("RGB").save(path, optimize=True, quality=82)
    return wrong


@contextmanager
def served(command: str, folder: Path) -> Iterator[str]:
    """The address that a command serves at, until the end."""
    words = [sys.executable, "-m", "lite3r_plugin", *command.split()[1:]]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next(line for line in process.stdout if "http://" in line)
        yield line[line.index("http://") :].split()[0]
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(30)


def main(images: Path, folder: Path) -> None:
    """Take all pictures into `images`; the commands run in `folder`."""
    typed = commands()
    images.mkdir(parents=True, exist_ok=True)
    photograph_terminal(run(typed["demo"], folder), images / "demo_terminal.png")
    assert photograph_page(folder / "lite3r-demo" / "demo.html", images / "demo_page.jpg") == []
    with Image.open(folder / "lite3r-demo" / "demo.png") as picture:
        picture.convert("RGB").save(images / "demo.jpg", quality=80, optimize=True)
    film(folder / "walk.mp4")
    photograph_terminal(run(typed["reconstruct"], folder), images / "video_terminal.png")
    assert photograph_page(folder / "room" / "scene.html", images / "video_page.jpg") == []
    with served(typed["view"], folder) as address:
        photograph_page(address, images / "live_page.jpg", wait=5)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        main(Path(sys.argv[1]), Path(temporary))
