"""edit: changing what a model knows."""
