"""``python -m lite3r_plugin``: the same as ``lite3r``."""

from .cli.app import main

if __name__ == "__main__":
    main()
