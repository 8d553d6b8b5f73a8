"""One parity case: the tensors of a reference implementation, and what has been compared with them so far."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from compact import expand, read_compact
from safetensors.torch import load_file
from torch import Tensor, nn

from vidssl.core.errors import UserError
from vidssl.model.grid import Mask
from vidssl.objective.masked_prediction import MaskedPrediction
from vidssl.pretrained import public
from vidssl.pretrained.key_maps import JEPA, RenamedTensors, rename

Precision = Literal["fp32", "bf16"]
AnyModule = TypeVar("AnyModule", bound=nn.Module)
INPUTS = ("state.", "clips", "images", "mask", "decode_mask", "ids_restore", "context_ids", "target_ids.")
# Largest errors that pass. Gradients are relative to the largest entry (full cases) or the norm (compact
# cases).
FULL_LIMITS = {"output": 1e-4, "gradient": 1e-3, "trace": 1e-4, "final": 1e-4}
COMPACT_LIMITS = {"output": 1e-5, "gradient": 1e-3, "trace": 1e-4, "final": 2e-5}
# bf16 keeps 8 bits: what the networks of the cases lose under autocast, with a margin of about two.
BF16_LIMITS = {"output": 0.07, "gradient": 0.8, "trace": 0.0, "final": 0.0}
MIN_RELATIVE_NORM = 1e-3  # of the case's largest gradient: smaller ones are compared with this norm
SHARED_GRADIENTS = {
    "class_position": "class_token",
    "table": "positions.table",
}  # one parameter in our modules
FIRST_ROWS_USED = ("query.tokens", "predictor.modality")  # the reference has a tensor for each row


class Case:
    """A case in one of two forms. Full: every tensor of the reference is stored. Compact (see
    vectors/README.md): weights and inputs are recreated, and six numbers are stored of every gradient."""

    def __init__(self, path: Path, device: str = "cpu", precision: Precision = "fp32"):
        """device: where our modules compute; precision: of their forward passes, by autocast."""
        self.name = path.stem
        self.device = torch.device(device)
        self.precision = precision
        self.about = json.loads(path.with_suffix(".json").read_text())
        self.is_compact = bool({"state", "inputs"} & set(self.about))
        if self.is_compact:
            self.about, self.tensors = read_compact(path.with_suffix(".json"))
        else:
            self.tensors = load_file(path.with_suffix(".safetensors"))
        self.limits = COMPACT_LIMITS if self.is_compact else FULL_LIMITS
        if precision == "bf16":
            self.limits = BF16_LIMITS
        self.geometry = self.about.get("geometry", {})
        self.options = self.about.get("options", {})
        self.state = self.subtree("state")
        outputs = self.about.get("stored", self.tensors)
        self.not_compared = {k for k in outputs if not k.startswith(INPUTS)}
        self.largest_error = dict.fromkeys(self.limits, (0.0, "-"))

    def __contains__(self, key: str) -> bool:
        return key in self.tensors

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key].to(self.device)

    def place(self, module: AnyModule) -> AnyModule:
        """Moves one of our modules to the device of the case."""
        return module.to(self.device)

    def autocast(self) -> torch.autocast:
        """Context of the forward passes."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def subtree(self, name: str) -> dict[str, Tensor]:
        return {k.removeprefix(f"{name}."): v for k, v in self.tensors.items() if k.startswith(f"{name}.")}

    def count(self, prefix: str) -> int:
        return sum(k.startswith(prefix) for k in self.tensors)

    @property
    def passes(self) -> bool:
        within = all(error <= self.limits[kind] for kind, (error, _) in self.largest_error.items())
        return within and not self.not_compared

    def record(self, kind: str, error: float, what: str) -> None:
        if not error <= self.largest_error[kind][0]:  # a NaN counts as the largest
            self.largest_error[kind] = error, what

    def compare(self, key: str, ours: Tensor, kind: str = "output") -> None:
        """Compares one output of the reference with ours."""
        reference = self.tensors[key].double()
        if ours.numel() != reference.numel():
            raise UserError(f"{self.name}: {key} is {list(reference.shape)}, ours {list(ours.shape)}")
        error = (ours.cpu().double().reshape(reference.shape) - reference).abs().max().item()
        self.record(kind, error, key)
        self.not_compared.discard(key)

    def compare_relative(self, key: str, ours: Tensor) -> None:
        """Compares a sum, by its error in proportion to it."""
        reference = self.tensors[key].double()
        self.record("output", ((ours.cpu().double() - reference).abs() / reference.abs()).max().item(), key)
        self.not_compared.discard(key)

    def mask(self, index: int | str) -> Mask:
        return Mask(self[f"context_ids.{index}"], self[f"target_ids.{index}"][:, None])

    def overrides(self) -> dict[str, Any]:
        """Facts about the model that its state dict does not contain."""
        size = self.geometry["img"]
        height, width = size if isinstance(size, list) else (size, size)
        frames = 1 if self.is_image else self.geometry["frames"]
        overrides = {"frames": frames, "height": height, "width": width}
        if self.options.get("use_rope") and self.options.get("rope_layout", "tiled") == "tiled":
            overrides["positions"] = "rope"
        heads = {"heads": self.geometry["heads"], "predictor_heads": self.geometry["dheads"]}
        return overrides | heads

    @property
    def is_image(self) -> bool:
        return "images" in self and "clips" not in self

    @property
    def video(self) -> Tensor:
        """[B, 3, T, H, W]; an image is a clip of one frame."""
        return self["images"][:, :, None] if self.is_image else self["clips"]

    def compare_objective_gradients(self, objective: MaskedPrediction) -> None:
        """Compares the gradients of encoder, predictor and query with the reference's."""
        name, rules = public.detect_format(self.state, self.name, self.overrides())

        def to_our_names(state: dict[str, Tensor]) -> RenamedTensors:
            renamed = rename(state, rules, self.name)
            return public.canonicalise(renamed, name, {}) if rules is JEPA else renamed

        parts = {"encoder.": objective.encoder, "predictor.": objective.predictor, "query.": objective.query}
        ours = {p + k: v.grad for p, module in parts.items() for k, v in module.named_parameters()}
        self.compare_gradients(to_our_names, ours)

    def compare_gradients(
        self, to_our_names: Callable[[dict[str, Tensor]], RenamedTensors], ours: dict[str, Tensor | None]
    ) -> None:
        """to_our_names: converts a state dict of the reference; ours: gradients by our names."""
        if not self.is_compact:
            reference = self.subtree("grad")
            # Names come from the state: some of them are told by tensors beside, which may have no gradient.
            beside = [k for k in self.state if not re.search(r"^(target|ema)_encoder\.|mask_tokens", k)]
            zeros = {k: torch.zeros_like(self.state[k]) for k in beside}
            renamed = to_our_names(zeros | reference)
            for key, gradient in renamed.tensors.items():
                if renamed.origin[key] not in reference:
                    continue
                expected, found = align(key, gradient, ours)
                found = found.cpu()
                error = (found.reshape(expected.shape) - expected).abs().max() / expected.abs().max()
                self.record("gradient", error.item(), key)
            self.not_compared -= {f"grad.{k}" for k in reference}
        elif "grad" in self:
            shapes = {name: self.about["shapes"][name] for name in self.about["gradients"]}
            gradients = in_reference_layout(shapes, to_our_names, ours)
            smallest_norm = MIN_RELATIVE_NORM * self.tensors["grad"][:, 0].max().item()
            for name, row in zip(shapes, self.tensors["grad"].double(), strict=True):
                error = (summary(gradients[name]) - row).abs().max().item()
                self.record("gradient", error / max(row[0].item(), smallest_norm), name)
            self.not_compared.discard("grad")

    def compare_final(self, networks: dict[str, dict[str, Tensor]]) -> None:
        """Compares the six numbers of every weight after the last step. networks: our weights by their name
        in the reference's state dict (encoder, target_encoder, predictor)."""
        names = sorted(name for pattern in self.about["final_rows"] for name in expand(pattern))
        rows = dict(zip(names, self.tensors["final"].double(), strict=True))
        for network, weights in networks.items():
            own = network.removeprefix("target_")
            shapes = {
                name.replace(network, own, 1): self.about["shapes"][name.replace(network, own, 1)]
                for name in names
                if name.startswith(f"{network}.")
            }
            found = in_reference_layout(
                shapes, lambda state: rename(state, JEPA, self.name), dict[str, Tensor | None](weights)
            )
            for name, tensor in found.items():
                error = (summary(tensor) - rows[name.replace(own, network, 1)]).abs()
                error[1] /= tensor.numel() ** 0.5  # the sum of n entries
                self.record("final", error.max().item(), name.replace(own, network, 1))
        self.not_compared.discard("final")


def align(key: str, reference: Tensor, ours: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
    """The parts of the reference's and of our tensor `key` that belong together."""
    kind = key.rsplit(".", 1)[-1]
    found = ours[key.replace(kind, SHARED_GRADIENTS[kind]) if kind in SHARED_GRADIENTS else key]
    assert found is not None, key
    if key in FIRST_ROWS_USED:
        found = found[: reference.numel() // found.shape[1]]
    if kind == "table" and reference.numel() == found.numel() + found.shape[-1]:
        reference = reference.flatten(0, -2)[1:]  # the first row is the position of the class token
    return reference, found


def in_reference_layout(
    shapes: dict[str, list[int]],
    to_our_names: Callable[[dict[str, Tensor]], RenamedTensors],
    ours: dict[str, Tensor | None],
) -> dict[str, Tensor]:
    """Our tensors in the names and shapes of the reference, f64.

    Every entry of the reference gets a number, the numbers are converted like a checkpoint, and so they tell
    where each of our entries belongs. Zeros that the conversion fills in have number 0.
    """
    numbers: dict[str, Tensor] = {}
    total = 1
    for name, shape in shapes.items():
        size = int(torch.Size(shape).numel())
        numbers[name] = torch.arange(total, total + size, dtype=torch.float64).reshape(shape)
        total += size
    values = torch.zeros(total, dtype=torch.float64)
    for key, converted in to_our_names(numbers).tensors.items():
        places, found = align(key, converted, ours)
        values[places.flatten().long()] = found.detach().cpu().double().flatten()
        if places.numel() < converted.numel():
            token = ours[key.rsplit(".", 1)[0] + ".class_token"]
            assert token is not None
            values[converted.flatten(0, -2)[0].long()] = token.detach().cpu().double()
    return {name: values[number.long()] for name, number in numbers.items()}


def summary(x: Tensor) -> Tensor:
    """The six stored numbers of a tensor: norm, sum, and the entries 0, n // 3, 2 n // 3 and n - 1."""
    x = x.detach().double().flatten()
    n = len(x)
    return torch.stack([x.norm(), x.sum(), x[0], x[n // 3], x[2 * n // 3], x[n - 1]])
