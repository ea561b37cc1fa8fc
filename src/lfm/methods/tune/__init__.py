"""tune: weights."""
