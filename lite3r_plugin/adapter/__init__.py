"""What a model adapter is written with: descriptions of attention sites, hooks, the plugin manager, how models are built."""
