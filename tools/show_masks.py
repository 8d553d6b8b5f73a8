"""`vidssl show masks` from a clone: python tools/show_masks.py ..."""

from vidssl.commands.show_masks import main
from vidssl.core.errors import run_cli

if __name__ == "__main__":
    run_cli(main)
