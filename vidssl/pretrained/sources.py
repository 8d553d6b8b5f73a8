"""What `encoder=` may name, checked without torch."""

import re
from pathlib import Path

from vidssl.core.errors import UserError

LIBRARIES = ("timm", "hf")
# What is read -> what it is; docs/checkpoints.md has the details.
FORMATS = {
    "RUN": "a run folder of vidssl train",
    "FILE.safetensors": "an encoder that this project wrote",
    "timm:NAME": "an image model of timm, by its name (encoder_file=FILE: its weights)",
    "hf:FOLDER_OR_NAME": "an image or video model of transformers: a folder, or a name of its hub",
    "V-JEPA": "the authors' files of V-JEPA (.pth.tar), V-JEPA 2 and 2.1 (.pt)",
    "I-JEPA": "the authors' files (.pth.tar)",
    "VideoMAE": "the authors' files of VideoMAE and VideoMAE V2 (.pth), fine-tuned too",
    "MAE": "the authors' files of MAE (.pth) and MAE-ST (.pyth)",
    "transformers": "folders of videomae, vjepa2, ijepa and vit_mae",
    "timm": "ViTs of timm: a .pth file, or a folder of the hub",
}


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
