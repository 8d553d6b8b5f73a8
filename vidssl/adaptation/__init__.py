"""Adapting a checkpoint to one's own videos: what is proposed and why, its runs and probes, and the table."""
