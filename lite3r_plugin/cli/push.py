"""`lite3r push`: a checkpoint to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[Path, typer.Argument(help="What save_lite3r wrote.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="owner/name; made if it does not exist.", show_default=False)],
    license_id: Annotated[
        str | None,
        typer.Option("--license", help="As the Hub names it, such as cc-by-nc-4.0; needed unless a card states one.", show_default=False),
    ] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the dense model; needed unless a card or the metrics tell.", show_default=False)
    ] = None,
    metrics: Annotated[
        Path | None, typer.Option(help="What `lite3r eval --checkpoint FOLDER --json FILE` wrote, for the card.", show_default=False)
    ] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="Of a new repository; by default it is private.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="The branch to commit to.", show_default=False)] = None,
    message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload a Lite3R checkpoint",
) -> None:
    """Upload a checkpoint with a model card to the Hugging Face Hub, once everything was checked."""
    from ..hub import push_to_hub
    from .show import say

    address = push_to_hub(
        folder,
        repo_id,
        private=private,
        revision=revision,
        commit_message=message,
        license=license_id,
        base_model=base_model,
        metrics=metrics,
    )
    say(f"{folder} -> {address}")
    say(f'load_lite3r(model, "{repo_id}") takes it from there.')
