"""`vidssl zoo-run` from a clone: python tools/zoo_run.py ..."""

from vidssl.commands.zoo_run import main
from vidssl.core.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
