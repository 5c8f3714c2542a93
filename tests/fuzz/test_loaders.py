"""Damaged data sets: what comes of them is views that hold what they promise, or an error of the package that names the data; soon, and
without much memory. ``--fuzz-seconds`` makes it go on for longer, from another seed each time."""

from __future__ import annotations

import random
import resource
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import WORDS, damage, restored
from time_limits import bounded
from written_scenes import WRITERS, render, write_layout

from lite3r_plugin.errors import Lite3RError
from lite3r_plugin.scene.data import DataWarning, Views, open_scenes
from lite3r_plugin.scene.data.archives import read_matrices
from lite3r_plugin.scene.data.colmap_model import read_model
from lite3r_plugin.scene.data.maps import read_colmap_depth, read_depth_png, read_mask, read_pfm
from lite3r_plugin.scene.data.mvsnet import read_camera, read_pairs
from lite3r_plugin.scene.data.text import parse_integers, parse_numbers, read_numbers
from lite3r_plugin.scene.images import load_image

MEMORY = 2**30  # bytes that all of them may add to the process
DEFAULT_SECONDS = 11.0  # of this process, for all layouts together
LEAST = 20  # damaged data sets of a layout, however slow the machine is


def memory() -> int:
    """The most bytes that the process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def say(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        sys.stdout.write(f"\n{text}\n")


def check(views: Views) -> None:
    """What `Views` promises."""
    assert views.images.isfinite().all()
    assert 0 <= views.images.min() <= views.images.max() <= 1
    assert views.depth.isfinite().all()
    assert (views.depth >= 0).all()
    assert torch.equal(views.valid, (views.depth > 0) & views.mask)
    assert len(set(views.names)) == len(views.names)
    if views.intrinsics is not None:
        K = views.intrinsics
        assert K.isfinite().all()
        assert (K[:, [0, 1], [0, 1]] > 0).all()
        assert (K[:, 2] == torch.tensor([0.0, 0, 1])).all()
    if views.world_to_camera is not None:
        R = views.world_to_camera[:, :, :3].double()
        assert views.world_to_camera.isfinite().all()
        torch.testing.assert_close(R @ R.mT, torch.eye(3).double().expand_as(R), atol=1e-5, rtol=0)
        assert (torch.linalg.det(R) > 0).all()


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=[pytest.mark.slow] * (i % 8 > 0)) for i, kind in enumerate(sorted(WRITERS))])
def test_damaged_data_sets(
    kind: str, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = pytestconfig.getoption("--fuzz-seconds")
    seed = 0 if seconds is None else random.SystemRandom().randrange(2**32)
    root = write_layout(render(3, 16, 24), kind, tmp_path_factory.mktemp(kind))
    spec = f"{kind.removesuffix('-training').removesuffix('-text')}:{root}"
    outcomes: Counter[str] = Counter()
    start, before, number = time.process_time(), memory(), 0
    while number < LEAST or time.process_time() - start < (DEFAULT_SECONDS if seconds is None else seconds) / len(WRITERS):
        number += 1
        with restored(root):
            done = damage(root, random.Random(f"{kind} {seed} {number}"))
            what = f"{kind}, seed {seed}, number {number}: {'; '.join(done)}"
            with warnings.catch_warnings(), bounded(what):
                warnings.simplefilter("ignore", DataWarning)
                try:
                    for scene in open_scenes(spec):
                        check(scene.sample(range(len(scene)), random.Random(number).choice((None, (8, 12), (16, 24), (30, 14)))))
                    refused = None
                except Lite3RError as error:
                    refused = str(error)
                except Exception as error:
                    raise AssertionError(what) from error
            if refused is not None:
                assert str(root) in refused, what
                assert len(refused) < 3000, what
            outcomes["read" if refused is None else "refused"] += 1
    grown = memory() - before
    say(capsys, f"{kind}: {number} damaged data sets, {dict(outcomes)}, {grown / 2**20:.0f} MiB more, seed {seed}")
    assert grown < MEMORY
    assert outcomes["refused"] > 0


WORD = st.one_of(st.sampled_from(WORDS), st.floats().map(lambda x: repr(x).encode()), st.integers(-5, 2**70).map(lambda x: str(x).encode()))
CONTENT = st.one_of(
    st.binary(max_size=300),
    st.lists(st.tuples(WORD, st.sampled_from((b" ", b"\n", b"\t", b"\r\n", b"", b"&", b"\0"))), max_size=40).map(
        lambda parts: b"".join(word + gap for word, gap in parts)
    ),
    st.text(max_size=100).map(lambda text: text.encode("utf-16", errors="replace")),
)
HEADS = (
    b"", b"Pf\n3 2\n-1.0\n", b"3&2&1&", b"extrinsic\n1 0 0 0 0 1 0 0 0 0 1 0 0 0 0 1 intrinsic\n", b"2\n0\n1 1 0.5\n", b"PK\x03\x04",
    b"\x89PNG\r\n\x1a\n",
)  # fmt: skip
READERS: dict[str, Callable[[Path], object]] = {
    "pair.txt": read_pairs,
    "cam.txt": read_camera,
    "numbers.txt": lambda path: read_numbers(path, 9, 16),
    "words.txt": lambda path: (
        parse_numbers(path.read_text("latin-1").split(), path),
        parse_integers(path.read_text("latin-1").split(), path),
    ),
    "depth.pfm": read_pfm,
    "depth.bin": read_colmap_depth,
    "depth.png": read_depth_png,
    "mask.png": read_mask,
    "image.jpg": load_image,
    "cameras.npz": lambda path: read_matrices(path, "world_mat_"),
    "cameras.txt": lambda path: read_model(path.parent),
}


@pytest.mark.parametrize("name", sorted(READERS))
def test_any_content(name: str, tmp_path: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = pytestconfig.getoption("--fuzz-seconds")
    path, outcomes, before = tmp_path / name, Counter[str](), memory()
    (tmp_path / "images.txt").write_text("1 1 0 0 0 0 0 0 1 a.png\n\n")

    @settings(
        max_examples=40 if seconds is None else int(100 * seconds),
        deadline=None,
        database=None,
        derandomize=seconds is None,
        suppress_health_check=list(HealthCheck),
    )
    @given(head=st.sampled_from(HEADS), content=CONTENT)
    def read(head: bytes, content: bytes) -> None:
        path.write_bytes(head + content)
        with bounded(head + content):
            try:
                READERS[name](path)
                refused = None
            except Lite3RError as error:
                refused = str(error)
        assert refused is None or str(tmp_path) in refused
        outcomes["read" if refused is None else "refused"] += 1

    read()
    say(capsys, f"{name}: {dict(outcomes)}, {(memory() - before) / 2**20:.0f} MiB more")
    assert memory() - before < MEMORY
