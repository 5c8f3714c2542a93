"""The subcommands of `lite3r`, one module each. Their heavy imports are inside the functions, so that help is instant."""
