"""The parts of tools/zoo_run.py."""
