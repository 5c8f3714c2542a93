"""Where a checkpoint is: in a folder, or on the Hugging Face Hub."""

from __future__ import annotations

import os
from pathlib import Path

from ..adapter.downloads import download, is_hub_id
from ..errors import CheckpointError, HubError, shown
from .seal import CONFIG_NAME, WEIGHTS_NAME

FILES = (CONFIG_NAME, WEIGHTS_NAME)


def find_checkpoint(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> Path:
    """The folder of the checkpoint that `source` names, as `load_lite3r` says, downloaded where it is on the Hub.

    Raises:
        CheckpointError: `source` is neither a path nor a text, it is a folder and something was said about the Hub, or the repository
            holds no checkpoint.
        HubError: the Hub does not give it.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise CheckpointError(f"load_lite3r takes a folder or a Hub id like 'owner/name', got {shown(source)}")
    given = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only or None, "token": token}
    text = os.fspath(source)
    if isinstance(source, os.PathLike) or os.path.exists(text) or not is_hub_id(text):
        if about := next((name for name, value in given.items() if value is not None), None):
            why = "exists here" if os.path.exists(text) else "is a path" if isinstance(source, os.PathLike) else "is no owner/name"
            raise CheckpointError(f"{about}= is about the Hugging Face Hub, but {text[:200]} {why}, so it is taken for a folder")
        return Path(text)
    folder = download(
        text, FILES, revision=revision, cache_dir=None if cache_dir is None else Path(cache_dir), local_files_only=local_files_only,
        token=token, instead=f"pass the path of a folder (there is none called {text} here)",
    )  # fmt: skip
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise HubError(
            f"{text} holds no {' and no '.join(missing)}" + (f" at {revision!r}" if revision else "")
            + ": it is no checkpoint that push_to_hub wrote, or it was cached in part, which loading it once with a network mends"
        )  # fmt: skip
    return folder
