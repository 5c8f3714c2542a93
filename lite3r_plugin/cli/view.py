"""`lite3r view`: look around in what `lite3r reconstruct` wrote."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..scene.export import Facts, Reconstruction

Host = Annotated[str, typer.Option("--host", help="Where the live page listens; 0.0.0.0 lets other machines in.")]
Port = Annotated[int, typer.Option("--port", min=1, max=65535, help="Of the live page; where it is taken, the next one.")]


def view(
    file: Annotated[Path, typer.Argument(help="An *.npz file or a folder of `lite3r reconstruct --out`.", show_default=False)],
    out: Annotated[
        Path | None, typer.Option(help="Write one *.html file to look around in, and serve nothing.", show_default=False)
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 8080,
) -> None:
    """Look around in a reconstruction: a live page in the browser, or one file that needs no server."""
    from ..files import check_output
    from ..scene.export import check_viewer, load, save_page
    from .show import say

    if file.suffix.lower() in (".html", ".ply", ".glb"):
        what = "is opened by a browser" if file.suffix.lower() == ".html" else "is for other viewers"
        raise InputError(f"{file} {what}; name an *.npz file or a folder of `lite3r reconstruct --out`")
    if out is None:
        check_viewer(host)
    else:
        check_output(out, ".html")
    runs, facts = load(file)
    if out is None:
        serve(runs, facts, host, port)
    else:
        save_page(out, runs, facts)
        say(f"wrote {out} (a page to look around in; open it in a browser)")


def serve(runs: Mapping[str, Reconstruction], facts: Facts, host: str, port: int) -> None:
    """Serve the live page until Ctrl-C."""
    from ..evaluation import quiet
    from ..scene.export import live_page
    from .show import say

    with quiet():
        server = live_page(runs, facts, host, port)
    place = "localhost" if host in ("127.0.0.1", "0.0.0.0") else f"[{host}]" if ":" in host else host
    say(f"look around at http://{place}:{server.get_port()} (Ctrl-C ends it)")
    try:
        wait()
    except KeyboardInterrupt:
        say("")
    finally:
        with quiet():
            server.stop()


def wait() -> None:
    """Until Ctrl-C, which raises KeyboardInterrupt."""
    while True:
        time.sleep(1)
