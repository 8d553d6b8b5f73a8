"""What `encoder=` may name, checked without torch."""

import re
from pathlib import Path

from vidssl.core.errors import UserError

LIBRARIES = ("timm", "hf")


def check_source(source: str, key: str = "", libraries: bool = False) -> None:
    """Raises UserError if a checkpoint is not there. key: that names it. libraries: timm:NAME and
    hf:FOLDER_OR_NAME are allowed."""
    if libraries and source.partition(":")[0] in LIBRARIES:
        return
    path = Path(source)
    if not path.exists():
        is_hub_name = re.fullmatch(r"[\w-]+/[\w.-]+", source) and not path.parent.exists()
        hint = f"; hf:{source} reads it from the Hugging Face hub" if is_hub_name else ""
        raise UserError(f"{key}{': ' * bool(key)}{path}: no such file or folder{hint}")
