"""The built-in model adapters of lite3r-plugin. Each module is a pluggy plugin, registered by entry point."""
