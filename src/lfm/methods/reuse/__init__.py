"""reuse: ensembling, fusing, selecting."""
