"""Builds the objective that a configuration describes."""

from collections.abc import Callable
from typing import Any

import torch

from vidssl import config
from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.predictor import PREDICTORS, QUERIES
from vidssl.model.vit import MODELS, Encoder
from vidssl.objective.masks import MASKS
from vidssl.objective.objective import ERRORS, ContextLoss, Objective
from vidssl.objective.targets import TARGETS


def build_objective(cfg: dict[str, Any], load_teacher: Callable[[str], Encoder] | None = None) -> Objective:
    """The method of a resolved configuration, with fresh weights drawn from run.seed.

    load_teacher: reads the frozen encoder of method.target.kind=teacher from its path (pretrained.load.load_teacher).
    """
    torch.manual_seed(cfg["run"]["seed"])
    size = cfg["augment"]["size"]
    method = cfg["method"]
    encoder = config.build(cfg["model"], MODELS, frames=cfg["data"]["frames"], height=size, width=size)
    given = {}
    if method["target"]["kind"] == "teacher":
        if load_teacher is None:
            raise UserError("method.target.kind: a teacher needs a function that loads it")
        given["teacher"] = load_teacher(method["target"]["path"])
    target = config.build(method["target"], TARGETS, encoder=encoder, **given)
    predictor = config.build(method["predictor"], PREDICTORS, encoder=encoder, out=target.width)
    query = config.build(method["query"], QUERIES, width=predictor.width)
    mask = config.build(method["mask"], MASKS)
    error = config.build(method["error"], ERRORS)
    context = config.build(method["context"], ContextLoss)
    optim = cfg["optim"]
    if target.encoder is not None and optim["schedule_steps"] and optim["momentum"][1] == 1:
        raise UserError(
            "optim.momentum: a momentum of 1 freezes the target, and with optim.schedule_steps the run goes on after it"
        )
    for stream in (
        cfg["data"],
        *cfg["data"]["extra_streams"],
    ):  # raises if the grid is too small for the mask
        blank = torch.zeros(1, 3, stream["frames"], size, size)
        mask(blank, encoder.grid_of(blank), KeyedRNG(0, 0, torch.zeros(1, dtype=torch.int64)))
    return Objective(encoder, mask, target, query, predictor, error, context)
