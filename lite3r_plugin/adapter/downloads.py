"""Files of the Hugging Face Hub, downloaded into the cache that all its users share; its errors in our words."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import HubError, short

_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form of a Hub id, ``owner/name``; ``./owner/name``, ``~/name`` and ``a/b/c`` have not."""
    return _ID.fullmatch(text) is not None


def download(
    repository: str,
    files: Sequence[str],
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    instead: str = "",
) -> Path:
    """The folder of the cache with these files of a model repository; what is there already is not downloaded again.

    Without a network the cache alone serves, if it holds the repository at that revision. A file that the repository lacks is missing in
    the folder.

    Args:
        repository: Its id, ``owner/name``.
        files: Names of files in it.
        revision: A branch, a tag or a commit; None: the main branch.
        cache_dir: The cache, by default that of huggingface_hub.
        local_files_only: Use the cache alone.
        token: An access token, by default that of `hf auth login`.
        instead: What the user may do instead, added to errors.

    Raises:
        HubError: the Hub does not give them, and the cache does not hold them.
    """
    from huggingface_hub import snapshot_download

    at = f"{', '.join(files)} of {repository}" + (f" at {revision!r}" if revision else "")
    with in_our_words(f"{at} cannot be had from the Hugging Face Hub", instead):
        folder = snapshot_download(
            repository, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token, allow_patterns=list(files)
        )
    return Path(folder)


@contextlib.contextmanager
def in_our_words(what: str, instead: str = "") -> Iterator[None]:
    """Raise `HubError` for whatever huggingface_hub raises inside: `what` failed, why, what to do, and what to do `instead`."""
    try:
        yield
    except Exception as error:  # of the library, of its HTTP client, of the system
        raise HubError(f"{what}: {_advice(error)}{f', or {instead}' if instead else ''} ({short(error, 200)})") from error


def _advice(error: Exception) -> str:
    from huggingface_hub import errors

    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return "the id or the revision is none; ids are like facebook/VGGT-1B"
    if isinstance(error, errors.GatedRepoError):
        return "the repository is gated; ask for access on its page, then log in with `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return "there is no such revision; check the name of the branch, the tag or the commit"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
        return "there is no such repository, or it is private; check the id, and log in with `hf auth login`"
    if status in (401, 403):
        return "you have no right to it; log in with `hf auth login` and a token that has the right"
    if (
        isinstance(error, (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError))
        or "Connect" in type(error).__name__
    ):
        return "the cache does not hold it, and the Hub was not asked or not reached; check the network, HF_HUB_OFFLINE, local_files_only"
    if isinstance(error, OSError) and error.errno is not None:
        return "the system refused; check the disk and the rights of the cache"
    return "check the id, the network and your login (`hf auth login`)"
