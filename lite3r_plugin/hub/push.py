"""`push_to_hub`: a checkpoint and its card to the Hugging Face Hub, after everything was checked."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ..adapter.downloads import in_our_words, is_hub_id
from ..apply import ranks
from ..apply.checkpoint import save_lite3r
from ..apply.seal import CONFIG_NAME, WEIGHTS_NAME, fingerprint, read_sealed
from ..errors import CheckpointError, HubError, InputError, shown
from ..files import locked
from .card import CARD_NAME, make_card, read_card
from .metrics import read_metrics

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"
FILES = (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)
LICENSES = "such as 'cc-by-nc-4.0', which VGGT's and Depth Anything 3's larger weights have, 'apache-2.0' or 'other'"


def push_to_hub(
    model_or_folder: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a Lite3R checkpoint",
    license: str | None = None,
    base_model: str | None = None,
    metrics: Any = None,
    whole: bool = False,
    token: str | None = None,
    api: HfApi | None = None,
) -> str:
    """Upload a checkpoint to the Hugging Face Hub, from which `load_lite3r` takes it by its id.

    The files, the card, the id, the repository and its visibility are checked before anything is made or uploaded; then one commit holds
    the two files and the card. A ``README.md`` in the folder is the card, as it is. Else one is written: the licence, the base model, how
    to load it, the configuration, and a table of `metrics` with the conditions under which they were measured. It takes the place of a
    card in the repository; of that one the licence and the base model are kept where none are given.

    Args:
        model_or_folder: A model with Lite3R, or the folder that `save_lite3r` wrote.
        repo_id: ``owner/name``. A repository that does not exist is made.
        private: Whether a new repository is private; None: it is, and one that exists stays as it is.
        revision: The branch to commit to, which is made where it does not exist; None: the main branch.
        commit_message: Of the commit.
        license: As the Hub names licences; needed unless a card states one.
        base_model: The Hub id of the dense model, or what it is in words; needed unless a card or `metrics` tell.
        metrics: What was measured: the path of a JSON file that `lite3r eval` wrote, what is in it, or an
            `lite3r_plugin.evaluation.Evaluation` as a dict with the data that it is of, ``evaluation.to_dict() | {"data": "..."}``.
        whole: Of a model: as in `save_lite3r`.
        token: An access token that may write, by default that of `hf auth login`.
        api: The client, by default `huggingface_hub.HfApi`.

    Returns:
        The address of the commit.

    Raises:
        CheckpointError: the folder holds no whole checkpoint, or the model is sharded; and what `save_lite3r` raises.
        InputError: an argument is of the wrong kind, no licence or base model is known, or `metrics` are of something else.
        HubError: the Hub cannot be reached, or refuses.
    """
    _check_arguments(repo_id, private, revision, commit_message, license, base_model)
    with _folder(model_or_folder, whole) as folder, locked(folder, shared=True), tempfile.TemporaryDirectory() as staging:
        record, _ = read_sealed(folder)
        found = None if metrics is None else read_metrics(metrics, record["config"], fingerprint(folder))
        own_card = folder / CARD_NAME
        if own_card.is_file():
            _check_own_card(own_card, {"license": license, "base_model": base_model, "metrics": metrics})
        client = _client(api, token)
        exists = _check_repository(client, repo_id, private)
        if own_card.is_file():
            _place(own_card, Path(staging))
        else:
            given = {"license": license, "base_model": base_model or (found and found.base_model)}
            stated = _stated(given, lambda: _card_of(client, repo_id, revision) if exists else {})
            card = make_card(record, repo_id, stated["license"], stated["base_model"], found)
            (Path(staging) / CARD_NAME).write_text(card, encoding="utf-8")
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            _place(folder / name, Path(staging))
        with in_our_words(f"{repo_id} cannot be written on the Hugging Face Hub"):
            client.create_repo(repo_id, private=private is not False, exist_ok=True)
            if revision not in (None, MAIN):
                client.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = client.upload_folder(
                repo_id=repo_id, folder_path=staging, revision=revision, commit_message=commit_message, allow_patterns=list(FILES)
            )
    return commit.commit_url


def _check_arguments(repo_id: Any, private: Any, revision: Any, commit_message: Any, license_id: Any, base_model: Any) -> None:
    if not isinstance(repo_id, str) or not is_hub_id(repo_id) or "--" in repo_id or ".." in repo_id:
        raise InputError(f"repo_id is owner/name, such as 'me/vggt-lite3r', got {shown(repo_id)}")
    if private is not None and not isinstance(private, bool):
        raise InputError(f"private is True, False or None, got {shown(private)}")
    if revision is not None and (not isinstance(revision, str) or not re.fullmatch(r"[\w][\w./-]*", revision)):
        raise InputError(f"revision is the name of a branch, got {shown(revision)}")
    if not isinstance(commit_message, str) or not commit_message.strip():
        raise InputError(f"commit_message is a text, got {shown(commit_message)}")
    if license_id is not None and (not isinstance(license_id, str) or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license_id)):
        raise InputError(f"license is what the Hub calls it, {LICENSES}, got {shown(license_id)}")
    if base_model is not None and (not isinstance(base_model, str) or not base_model.strip() or "\n" in base_model):
        raise InputError(f"base_model is a Hub id such as 'facebook/VGGT-1B', or a few words, got {shown(base_model)}")


@contextlib.contextmanager
def _folder(model_or_folder: Any, whole: bool) -> Iterator[Path]:
    if isinstance(model_or_folder, nn.Module):
        if ranks.is_sharded(model_or_folder):
            raise CheckpointError("this model is sharded: call save_lite3r in all processes, and push_to_hub with the folder in one")
        with tempfile.TemporaryDirectory() as folder:
            save_lite3r(model_or_folder, folder, whole=whole)
            yield Path(folder)
    elif isinstance(model_or_folder, (str, os.PathLike)):
        if whole:
            raise InputError("whole= says how a model is saved; a folder is uploaded as it is")
        folder = Path(model_or_folder)
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is no folder; push_to_hub takes a model with Lite3R or a folder written by save_lite3r")
        yield folder
    else:
        raise InputError(f"push_to_hub takes a model with Lite3R or a folder written by save_lite3r, got {shown(model_or_folder)}")


def _check_own_card(path: Path, given: Mapping[str, Any]) -> None:
    if other := [name for name, value in given.items() if value is not None]:
        raise InputError(f"{path} is the card of this checkpoint and goes up as it is: leave out {', '.join(other)}, or take the file away")
    if not read_card(path).get("license"):
        raise InputError(f"{path} states no licence: write `license: ...` into its metadata, {LICENSES}")


def _client(api: HfApi | None, token: str | None) -> HfApi:
    if api is not None:
        if token is not None:
            raise InputError("token is for the client that push_to_hub makes; give it to the api that you pass")
        return api
    from huggingface_hub import HfApi

    return HfApi(token=token)


def _check_repository(client: HfApi, repo_id: str, private: bool | None) -> bool:
    """Whether the repository exists. Raises `HubError` where the Hub does not answer, or where it is not as private as wanted."""
    from huggingface_hub.errors import RepositoryNotFoundError

    with in_our_words(f"{repo_id} cannot be looked up on the Hugging Face Hub"):
        try:
            found = client.model_info(repo_id)
        except RepositoryNotFoundError as error:
            if getattr(error.response, "status_code", 404) in (401, 403):  # no or a wrong token: making it would fail, too
                raise
            return False
    if private is not None and bool(found.private) != private:
        kind = "private" if found.private else "public"
        raise HubError(f"{repo_id} exists and is {kind}: change that on its page, or leave out private=")
    return True


def _card_of(client: HfApi, repo_id: str, revision: str | None) -> dict[str, Any]:
    """The metadata of the card that is in the repository."""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RevisionNotFoundError

    with in_our_words(f"the card of {repo_id} cannot be read"):
        try:
            path = client.hf_hub_download(repo_id, CARD_NAME, revision=revision)
        except (EntryNotFoundError, RevisionNotFoundError) as error:
            if isinstance(error, LocalEntryNotFoundError):  # the Hub was not reached
                raise
            return {}
    return read_card(Path(path))


def _stated(given: Mapping[str, str | None], read: Any) -> dict[str, str]:
    """`given`, and what is missing there from the card that `read` gives. Raises `InputError` where neither tells."""
    card = read() if None in given.values() else {}
    stated: dict[str, str] = {}
    for name, value in given.items():
        value = value if value is not None else card.get(name)
        value = value[0] if isinstance(value, list) and value else value
        if not isinstance(value, str) or not value:
            examples = LICENSES if name == "license" else "the Hub id of the dense model, such as 'facebook/VGGT-1B', or a few words"
            raise InputError(f"no {name} is known: pass {name}=, {examples}")
        stated[name] = value
    return stated


def _place(file: Path, folder: Path) -> None:
    try:
        (folder / file.name).symlink_to(file.absolute())
    except OSError:  # where links need rights
        shutil.copy2(file, folder / file.name)
