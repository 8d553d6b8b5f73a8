"""`vidssl convert` from a clone: python tools/convert.py ..."""

from vidssl.commands.convert import main
from vidssl.core.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
