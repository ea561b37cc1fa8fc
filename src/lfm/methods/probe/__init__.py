"""probe: what a model knows."""
