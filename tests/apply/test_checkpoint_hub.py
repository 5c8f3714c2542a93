"""load_lite3r from the Hub: by the real client, from its cache, without a network; and what is a folder and what an id."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_hub import http_error, randomize_branches, tiny
from huggingface_hub import errors

from lite3r_plugin import apply_lite3r, describe, load_lite3r, save_lite3r
from lite3r_plugin.adapter.weights import find_weights
from lite3r_plugin.errors import CheckpointError, HubError, InputError

ID, COMMITS = "me/tiny-lite3r", ("0" * 40, "1" * 40)
JSON, WEIGHTS = "lite3r_config.json", "lite3r.safetensors"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The cache with the repository at ``main`` (keep ratio 0.5) and at ``half`` (0.25)."""
    repository = tmp_path / "cache" / f"models--{ID.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    for commit, branch, ratio in zip(COMMITS, ("main", "half"), (0.5, 0.25), strict=True):
        (repository / "refs" / branch).write_text(commit)
        model = apply_lite3r(tiny(), keep_ratio=ratio)
        randomize_branches(model)
        save_lite3r(model, repository / "snapshots" / commit)
    return tmp_path / "cache"


def snapshot(cache: Path) -> Path:
    return next(cache.iterdir()) / "snapshots" / COMMITS[0]


def test_from_the_cache(cache: Path) -> None:
    loaded = load_lite3r(tiny(), ID, cache_dir=cache)
    assert describe(loaded).config.keep_ratio == 0.5
    again = load_lite3r(tiny(), snapshot(cache))
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("revision", ["half", COMMITS[1]])
def test_a_revision(revision: str, cache: Path) -> None:
    assert describe(load_lite3r(tiny(), ID, revision=revision, cache_dir=cache, local_files_only=True)).config.keep_ratio == 0.25


def test_only_the_two_files_are_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def download(repository: str, **options: Any) -> str:
        seen.update(options, repository=repository)
        return str(snapshot(cache))

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    load_lite3r(tiny(), ID, revision="half", token="hf_x", local_files_only=True)
    assert seen["repository"] == ID
    assert sorted(seen["allow_patterns"]) == [WEIGHTS, JSON]
    assert (seen["revision"], seen["token"], seen["local_files_only"]) == ("half", "hf_x", True)


@pytest.mark.slow
def test_in_a_process_that_is_told_to_be_offline(cache: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from fake_hub import tiny\nfrom lite3r_plugin import describe, load_lite3r\n"
        f"print(describe(load_lite3r(tiny(), {ID!r}, cache_dir=sys.argv[1])).config.keep_ratio)"
    )
    helpers = Path(__file__).parent.parent / "helpers"
    result = subprocess.run(
        [sys.executable, "-c", program, str(cache), str(helpers)], env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert result.stdout.strip() == "0.5", result.stderr


# Folders and ids


def test_a_folder_that_exists_is_a_folder(cache: Path, elsewhere: Path) -> None:
    folder = elsewhere / "me" / "tiny-lite3r"
    save_lite3r(apply_lite3r(tiny(), keep_ratio=0.75), folder)
    assert (
        describe(
            load_lite3r(
                tiny(),
                ID,
            )
        ).config.keep_ratio
        == 0.75
    )
    with pytest.raises(CheckpointError, match=r"revision= is about the Hugging Face Hub, but me/tiny-lite3r exists here, so it is taken"):
        load_lite3r(tiny(), ID, revision="main")
    shutil.rmtree(folder)
    assert describe(load_lite3r(tiny(), ID, cache_dir=cache)).config.keep_ratio == 0.5


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("source", [Path("me/tiny-lite3r"), "./me/tiny-lite3r", "me/tiny/lite3r", "me", "/me/tiny-lite3r"])
def test_what_is_no_id_is_a_folder(source: Any, cache: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no lite3r_config.json"):
        load_lite3r(tiny(), source)
    with pytest.raises(CheckpointError, match=r"cache_dir= is about the Hugging Face Hub, but .* (is a path|is no owner/name)"):
        load_lite3r(tiny(), source, cache_dir=cache)


def test_what_is_neither() -> None:
    with pytest.raises(CheckpointError, match=r"a folder or a Hub id like 'owner/name', got 3"):
        load_lite3r(tiny(), 3)  # pyright: ignore[reportArgumentType]


# What the Hub does not give


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("me/other", {}, "the cache does not hold it.*HF_HUB_OFFLINE.*pass the path of a folder .there is none called me/other"),
        (ID, {"revision": "v2"}, f"of {ID} at 'v2' cannot be had .*the cache does not hold it"),
        ("me/a--b", {}, "the id or the revision is none"),
    ],
)  # fmt: skip
def test_what_the_cache_lacks(source: str, options: dict[str, Any], message: str, cache: Path) -> None:
    model = tiny()
    with pytest.raises(HubError, match=message):
        load_lite3r(model, source, cache_dir=cache, **options)
    apply_lite3r(model)  # which it was not


@pytest.mark.parametrize("name", [JSON, WEIGHTS])
def test_a_repository_without_one_of_the_files(name: str, cache: Path) -> None:
    (snapshot(cache) / name).unlink()
    with pytest.raises(HubError, match=rf"{ID} holds no {name}: it is no checkpoint that push_to_hub wrote, or it was cached in part"):
        load_lite3r(tiny(), ID, cache_dir=cache)


def test_a_damaged_download(cache: Path) -> None:
    data = bytearray((snapshot(cache) / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (snapshot(cache) / WEIGHTS).write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged or was changed"):
        load_lite3r(tiny(), ID, cache_dir=cache)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("error", "message"),
    [
        (lambda: http_error(errors.GatedRepoError, 403), "gated; ask for access on its page, then log in"),
        (lambda: http_error(errors.RepositoryNotFoundError, 404), "no such repository, or it is private; check the id"),
        (lambda: http_error(errors.RevisionNotFoundError, 404), "no such revision; check the name of the branch"),
        (lambda: http_error(errors.HfHubHTTPError, 403), "you have no right to it"),
        (lambda: ConnectionError("no route to host"), "check the network.*no route to host"),
        (lambda: OSError(28, "No space left on device"), "the system refused; check the disk.*No space left"),
    ],
)
def test_what_the_hub_refuses(error: Callable[[], Exception], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise error()

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(HubError, match=message):
        load_lite3r(tiny(), ID)
    with pytest.raises(InputError, match=message):  # weights of models come the same way
        find_weights(ID)


# Machines with less


@pytest.mark.slow
def test_without_triton(tmp_path: Path) -> None:
    """In a process in which it cannot be imported: sites run dense, or in plain torch, and that is said."""
    for name, below in (("dense", None), ("sparse", 0)):
        model = apply_lite3r(tiny(), keep_ratio=0.5, dense_below=below, attention_backend="triton")
        randomize_branches(model)
        save_lite3r(model, tmp_path / name)
    program = (
        "import sys, warnings; sys.modules['triton'] = None; sys.path.insert(0, sys.argv[2])\n"
        "import torch\nfrom fake_hub import tiny\nfrom lite3r_plugin import describe, load_lite3r\n"
        "for name in ('dense', 'sparse'):\n"
        "    with warnings.catch_warnings(record=True) as caught:\n"
        "        warnings.simplefilter('always')\n"
        "        model = load_lite3r(tiny(), f'{sys.argv[1]}/{name}')\n"
        "    assert ['SlowPathWarning'] == [w.category.__name__ for w in caught], caught\n"
        "    assert 'triton is not installed' in str(caught[0].message)\n"
        "    with torch.no_grad(): model(torch.rand(1, 2, 3, 64, 64))\n"
        "    calls = [site.calls for site in describe(model).sites if site.sparse]\n"
        "    print(name, sum(c.sparse for c in calls), sum(c.dense for c in calls), describe(model).config.attention_backend)\n"
    )
    helpers = Path(__file__).parent.parent / "helpers"
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path), str(helpers)], capture_output=True, text=True)
    assert result.stdout.splitlines() == ["dense 0 1 auto", "sparse 1 0 auto"], result.stdout + result.stderr


def test_with_triton_nothing_is_said(tmp_path: Path) -> None:
    save_lite3r(apply_lite3r(tiny(), keep_ratio=0.5), tmp_path)
    load_lite3r(tiny(), tmp_path)  # warnings are errors
