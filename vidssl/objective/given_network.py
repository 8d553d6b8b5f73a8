"""Networks that the user gives as a file, for targets that only read their output."""

import warnings
import zipfile
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from vidssl.core.errors import UserError

# Ends of names that only this format has among the members of its archive; torch 2.6 writes no archive_format
MARKERS = {
    "export": ("archive_format", "serialized_exported_program.json"),
    "script": ("constants.pkl",),
}


class GivenNetwork:
    """A frozen network of a file: of torch.export (.pt2), or of TorchScript (.pt).

    No submodule: checkpoints do not hold it, every start reads it. It computes on the device of its inputs,
    in the precision of its weights whatever autocast says.
    """

    def __init__(self, path: str, option: str):
        """option: the key that names the path, for messages."""
        self._path = path
        self._option = option
        self._device = torch.device("cpu")
        self._network = read_network(path, option, self._device)

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        device = inputs[0].device
        if device != self._device:
            self._network = read_network(self._path, self._option, device)
            self._device = device
        has_autocast = torch.amp.is_autocast_available(device.type)
        with torch.autocast(device.type, enabled=False) if has_autocast else nullcontext():
            return self._network(*inputs)


def read_network(path: str, option: str, device: torch.device) -> nn.Module:
    """Reads the network onto a device. Raises UserError if the file holds none."""
    hint = "give a file that torch.export.save (.pt2) or torch.jit.save (.pt) wrote"
    if not Path(path).is_file():
        raise UserError(f"{option}: {path}: no such file; {hint}")
    members = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    if not any(name.endswith(marker) for name in members for marker in MARKERS.values()):
        raise UserError(f"{option}: {path} holds no network; {hint}")
    try:
        if any(name.endswith(MARKERS["export"]) for name in members):
            return torch.export.load(path).module().to(device)
        with warnings.catch_warnings():
            # torch calls TorchScript deprecated
            warnings.simplefilter("ignore", FutureWarning)
            return torch.jit.load(path, map_location=device)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{option}: {path} cannot be read ({reason}); {hint}") from error
