"""Runs compared at equal clips or FLOPs: the parts of `vidssl zoo-run`."""
