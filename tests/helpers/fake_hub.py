"""A Hugging Face Hub that is none, and a tiny model whose checkpoints go there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from huggingface_hub import errors
from torch import nn

from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.testbed import Testbed, TestbedConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def tiny() -> Testbed:
    """A tiny testbed, always with the same weights."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return Testbed(TestbedConfig(dim=64, depth=1)).eval()


def randomize_branches(model: nn.Module) -> None:
    """Give the linear branches values that are not zero."""
    for module in lite3r_modules(model).values():
        if module.sparse:
            nn.init.normal_(module.proj_lin.weight, std=0.1)


class Hub:
    """The methods of `huggingface_hub.HfApi` that are used, over dicts; every call that changes something is in `calls`."""

    def __init__(self, repositories: dict[str, bool] | None = None, cards: dict[str, str] | None = None) -> None:
        self.private = dict(repositories or {})
        self.cards = cards or {}
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.files: dict[str, bytes] = {}
        self.fail: Exception | None = None

    def model_info(self, repo_id: str) -> Any:
        if self.fail is not None:
            raise self.fail
        if repo_id not in self.private:
            raise http_error(errors.RepositoryNotFoundError, 404)
        return type("ModelInfo", (), {"private": self.private[repo_id]})

    def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None = None) -> str:
        if repo_id not in self.cards:
            raise http_error(errors.EntryNotFoundError, 404)
        return self.cards[repo_id]

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.calls.append(("create_repo", {"repo_id": repo_id, "private": private}))

    def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
        assert exist_ok
        self.calls.append(("create_branch", {"repo_id": repo_id, "branch": branch}))

    def upload_folder(self, *, folder_path: str, **options: Any) -> Any:
        self.calls.append(("upload_folder", options))
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return type("CommitInfo", (), {"commit_url": f"https://huggingface.co/{options['repo_id']}/commit/{COMMIT}"})


def http_error(kind: Any, status: int) -> Exception:
    """An error of huggingface_hub as a response makes it."""
    response = SimpleNamespace(status_code=status, headers={}, request=None, url="https://huggingface.co")
    return kind(f"{status} from the Hub", response=response)
