"""The command line, ``lite3r``. Subcommands are modules of `lite3r_plugin.cli`; plugins add others by the hook `lite3r_commands`."""

from __future__ import annotations

import errno
import functools
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..errors import Lite3RError
from .adapters import adapters
from .bench import bench
from .calibrate import calibrate
from .convert_official import convert_official
from .demo import demo
from .distill import distill
from .doctor import doctor
from .evaluate import evaluate
from .push import push
from .reconstruct import reconstruct
from .reports import ARGUMENTS
from .view import view


class _Group(TyperGroup):
    """Adds the commands of plugins; prints errors of the package and the system in one line, exit code 2, and its own warnings only."""

    @functools.cached_property
    def plugin_commands(self) -> dict[str, Any]:
        """Commands that installed plugins add, by name."""
        from .plugins import plugin_commands

        return plugin_commands(taken=self.commands)

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *self.plugin_commands]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return super().get_command(ctx, cmd_name) or self.plugin_commands.get(cmd_name)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[ARGUMENTS] = list(args)  # for reports, which say how to repeat them
        return super().parse_args(ctx, args)

    def main(self, *args: Any, **kwargs: Any) -> Any:
        from . import show as _show

        def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
            if category.__module__.startswith("lite3r_plugin"):  # model libraries warn about their own affairs
                _show.warn(str(message))

        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.showwarning = show
            return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        from . import show as _show

        try:
            return super().invoke(ctx)
        except Lite3RError as error:
            _show.error(str(error))
            raise typer.Exit(2) from None
        except OSError as error:  # of the system: no room, no permission, a name that is too long
            if error.errno == errno.EPIPE:
                raise
            _show.error(f"{error.strerror or error}" + (f": {error.filename}"[:300] if error.filename else ""))
            raise typer.Exit(2) from None


app = typer.Typer(
    name="lite3r",
    cls=_Group,
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Make 3D reconstruction transformers faster: sparse-linear attention for VGGT, Depth Anything 3, Pi3 and more.",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from ..version import __version__

        typer.echo(f"lite3r-plugin {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")] = False,
) -> None:
    pass


app.command()(demo)
app.command()(reconstruct)
app.command()(view)
app.command()(doctor)
app.command()(bench)
app.command("eval")(evaluate)
app.command()(calibrate)
app.command()(distill)
app.add_typer(adapters, name="adapters")
app.command("convert-official")(convert_official)
app.command()(push)


def main() -> None:
    """Run the command line."""
    app()
