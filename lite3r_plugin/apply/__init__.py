"""The verbs: what changes a model, what tells about it, what saves it."""
