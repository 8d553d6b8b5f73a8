"""One case of tools/check_parity.py: the tensors of a reference implementation, and what was compared with
them."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from vidssl.core.errors import UserError
from vidssl.model.grid import Mask
from vidssl.objective.objective import Objective
from vidssl.pretrained import public
from vidssl.pretrained.key_maps import JEPA, rename

INPUTS = ("state.", "clips", "images", "mask", "decode_mask", "ids_restore", "context_ids", "target_ids.")


class Case:
    """One case: its tensors, and what was compared so far."""

    def __init__(self, path: Path):
        self.name = path.stem
        self.tensors = load_file(path)
        self.about = json.loads(path.with_suffix(".json").read_text())
        self.geometry, self.options = self.about.get("geometry", {}), self.about.get("options", {})
        self.state = {k.removeprefix("state."): v for k, v in self.tensors.items() if k.startswith("state.")}
        self.left = {k for k in self.tensors if not k.startswith(INPUTS)}
        self.worst: dict[str, tuple[float, str]] = {"output": (0.0, "-"), "gradient": (0.0, "-")}

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]

    def note(self, kind: str, error: float, what: str) -> None:
        if not error <= self.worst[kind][0]:  # so that a NaN counts as the worst
            self.worst[kind] = error, what

    def compare(self, key: str, got: Tensor) -> None:
        """Output `key` of the reference against ours."""
        want = self[key].float()
        if got.numel() != want.numel():
            raise UserError(f"{self.name}: {key} is {list(want.shape)}, ours {list(got.shape)}")
        self.note("output", (got.reshape(want.shape) - want).abs().max().item(), key)
        self.left.discard(key)

    def ids(self, i: int) -> Mask:
        return Mask(self[f"context_ids.{i}"], self[f"target_ids.{i}"][:, None])

    def given(self) -> dict[str, Any]:
        """What a file does not say of its model."""
        g, o = self.geometry, self.options
        height, width = g["img"] if isinstance(g["img"], list) else [g["img"]] * 2
        given = {"frames": 1 if self.image else g["frames"], "height": height, "width": width}
        if o.get("use_rope") and o.get("rope_layout", "tiled") == "tiled":
            given["positions"] = "rope"
        return {**given, "heads": g["heads"], "predictor_heads": g["dheads"]}

    @property
    def image(self) -> bool:
        return "images" in self and "clips" not in self

    @property
    def video(self) -> Tensor:
        """[B, 3, T, H, W]; an image is a clip of one frame."""
        return self["images"][:, :, None] if self.image else self["clips"]

    def gradients(self, objective: Objective) -> None:
        """Every gradient of the reference against ours, in our names."""
        name, rules = public.detect(self.state, self.name, self.given())
        theirs = {k.removeprefix("grad."): v for k, v in self.tensors.items() if k.startswith("grad.")}
        renamed = rename(theirs, rules, self.name)
        renamed = public.canonicalise(renamed, name, {}) if rules is JEPA else renamed
        parts = {"encoder.": objective.encoder, "predictor.": objective.predictor, "query.": objective.query}
        ours = {p + k: v.grad for p, module in parts.items() for k, v in module.named_parameters()}
        self.compare_gradients(renamed.tensors, ours)
        self.left -= {f"grad.{k}" for k in theirs}

    def compare_gradients(self, theirs: dict[str, Tensor], ours: dict[str, Tensor | None]) -> None:
        same = {
            "class_position": "class_token",
            "table": "positions.table",
        }  # a token and its position are one here
        for key, want in theirs.items():
            end = key.rsplit(".", 1)[-1]
            got = ours[key.replace(end, same[end]) if end in same else key]
            assert got is not None, key
            if key in (
                "query.tokens",
                "predictor.modality",
            ):  # the first rows: the reference keeps one tensor a row
                got = got[: want.numel() // got.shape[1]]
            if end == "table" and want.numel() == got.numel() + got.shape[-1]:
                want = want.flatten(0, -2)[1:]  # its first row is the class token's
            error = (got.reshape(want.shape) - want).abs().max() / want.abs().max()
            self.note("gradient", error.item(), key)
