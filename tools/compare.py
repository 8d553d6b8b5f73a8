"""`vidssl compare` from a clone: python tools/compare.py ..."""

from vidssl.commands.compare import main
from vidssl.core.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
