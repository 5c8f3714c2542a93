"""Running `lite3r` as users do."""

from __future__ import annotations

from typer.testing import CliRunner, Result

from lite3r_plugin.cli.app import app


def lite3r(*args: object, code: int = 0) -> Result:
    """Run ``lite3r`` and check the exit code; an error must be one line."""
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output + repr(result.exception)
    if code == 2:
        assert "Traceback" not in result.output
    return result


def fails(*args: object) -> str:
    """The message of a run that must fail with an error of the package."""
    stderr = lite3r(*args, code=2).stderr.strip()
    line = stderr.splitlines()[-1]
    assert line.startswith("error: "), stderr
    return line
