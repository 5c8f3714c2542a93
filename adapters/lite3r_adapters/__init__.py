"""The built-in model adapters of lite3r-plugin: each module or package of a family is a pluggy plugin, registered by entry point."""
