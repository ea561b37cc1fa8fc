"""State dicts larger than memory: read, compute and write them in chunks."""
