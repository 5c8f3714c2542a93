"""The page that is one file: looked at in a browser."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import browser_page
from PIL import Image
from reconstructions import EVIL, wall

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.export import Facts, save_page
from lite3r_plugin.scene.export.page import upright


def pixels(page: object) -> np.ndarray:
    """What is on the screen beside the panel and above the strip, ``[H, W, 3]``."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    picture = page.screenshot(clip={"x": 460, "y": 60, "width": 540, "height": 520})
    return np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).astype(int)


def covered(picture: np.ndarray, channel: int) -> float:
    """The share of pixels in which a channel is far above the others."""
    others = np.delete(picture, channel, -1).max(-1)
    return float((picture[..., channel] > others + 80).mean())


def test_page(tmp_path: Path) -> None:
    facts = Facts("a run " + EVIL, ("", "time"), (("dense", "1.0 s"), ("lite3r", "0.5 s")), ("a note",))
    save_page(tmp_path / "a.html", {"dense": wall((0, 0, 1)), "lite3r": wall((0, 1, 0))}, facts)
    with browser_page(tmp_path / "a.html") as (page, wrong):
        with_photographs = pixels(page)
        page.locator("#photographs").uncheck()
        assert (pixels(page) != with_photographs).any()
        # The main run is shown first, with its numbers; the other one after a click.
        assert page.title() == "a run " + EVIL
        assert page.locator("tbody tr.now").inner_text().split() == ["lite3r", "0.5", "s"]
        lite3r = pixels(page)
        assert covered(lite3r, 1) > 0.1
        assert covered(lite3r, 2) < 0.01
        page.get_by_role("button", name="dense").click()
        assert page.locator("tbody tr.now").inner_text().split() == ["dense", "1.0", "s"]
        dense = pixels(page)
        assert covered(dense, 2) > 0.1
        assert covered(dense, 1) < 0.01
        # The surest points are those of the upper part: with a quarter of them the rest is empty.
        page.locator("#confidence").fill("25")
        few = pixels(page)
        assert 0.02 < covered(few, 2) < 0.6 * covered(dense, 2)
        rows = np.nonzero((few[..., 2] > 150).any(1))[0]
        assert rows.mean() < np.nonzero((dense[..., 2] > 150).any(1))[0].mean()
        page.locator("#confidence").fill("100")
        # Cameras are drawn where asked for, and a photograph takes one to its camera, which the wall fills.
        with_cameras = pixels(page)
        page.locator("#cameras").uncheck()
        assert (pixels(page) != with_cameras).any()
        page.locator("#strip button").nth(1).click()
        assert covered(pixels(page), 2) > 0.6
        # The mouse turns the scene.
        page.keyboard.press("r")
        before = pixels(page)
        page.mouse.move(700, 300)
        page.mouse.down()
        page.mouse.move(800, 350)
        page.mouse.up()
        assert (pixels(page) != before).any()
        assert page.locator("#strip img").count() == 3
        assert page.locator("#failed").is_hidden()
        assert wrong == []


def test_up_is_up_however_the_cameras_look_down() -> None:
    for pitch in (0.0, 0.5, -0.5):
        turn = upright(wall((1, 0, 0), pitch))
        torch.testing.assert_close(turn @ turn.T, torch.eye(3))
        assert torch.linalg.det(turn) > 0.99
        down = wall((1, 0, 0), pitch).prediction.world_to_camera[0, 1, :3]
        torch.testing.assert_close(turn @ -down, torch.tensor([0.0, 1, 0]))


def test_points_far_away_take_no_precision_and_points_nowhere_are_refused(tmp_path: Path) -> None:
    scene = wall((1, 0, 0))
    scene.prediction.points[0, 0, 0] = 1e6
    save_page(tmp_path / "a.html", {"dense": scene}, Facts("a"))
    text = (tmp_path / "a.html").read_text()
    assert '"count":9215' in text
    assert "http" not in text.replace("http-equiv", "")
    scene.prediction.depth[:] = -1
    with pytest.raises(InputError, match="no valid point"):
        save_page(tmp_path / "a.html", {"dense": scene}, Facts("a"))
