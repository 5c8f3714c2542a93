"""``accelerate launch -m lite3r_plugin.distill CONFIG.toml``: the same as ``lite3r distill CONFIG.toml``, on as many processes.

This module is only run: `lite3r_plugin.distill` is the function.
"""

import sys

if __name__ not in ("__main__", "__mp_main__"):  # the second: a process that reads data for one that was started so
    raise ImportError(f"{__name__} is a function, from lite3r_plugin import distill; the module of that name is run: python -m {__name__}")

if __name__ == "__main__":
    from lite3r_plugin.cli.app import app

    app(["distill", *sys.argv[1:]])
