"""Jobs of sandboxes that say that they run, and then never end."""

import time
from pathlib import Path

from vidssl.data.isolation import Reporter


def write_and_sleep(_: Reporter, path: str) -> None:
    Path(path).touch()
    time.sleep(1000)
