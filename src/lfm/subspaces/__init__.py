"""Merging weights as matrices: by the subspaces that each model's change lies in."""
