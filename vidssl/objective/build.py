"""Builds the objective that a configuration describes."""

from typing import Any

import torch

from vidssl import config
from vidssl.core.errors import UserError
from vidssl.core.rng import KeyedRNG
from vidssl.model.predictor import PREDICTORS, QUERIES
from vidssl.model.vit import MODELS
from vidssl.objective.masks import MASKS
from vidssl.objective.objective import ERRORS, ContextLoss, Objective
from vidssl.objective.targets import TARGETS, Ema


def build_objective(cfg: dict[str, Any]) -> Objective:
    """The method of a resolved configuration, with fresh weights drawn from run.seed."""
    torch.manual_seed(cfg["run"]["seed"])
    size, method = cfg["augment"]["size"], cfg["method"]
    encoder = config.build(cfg["model"], MODELS, frames=cfg["data"]["frames"], height=size, width=size)
    target = config.build(method["target"], TARGETS, encoder=encoder)
    predictor = config.build(method["predictor"], PREDICTORS, encoder=encoder, out=target.width)
    query = config.build(method["query"], QUERIES, width=predictor.width)
    mask, error = config.build(method["mask"], MASKS), config.build(method["error"], ERRORS)
    context = config.build(method["context"], ContextLoss)
    if isinstance(target, Ema) and cfg["optim"]["schedule_steps"] and cfg["optim"]["momentum"][1] == 1:
        raise UserError(
            "optim.momentum: the target stands still once it is 1, and with optim.schedule_steps the run goes on"
        )
    for stream in (cfg["data"], *cfg["data"]["extra_streams"]):  # a mask that cannot be is found here
        one = torch.zeros(1, 3, stream["frames"], size, size)
        mask(one, encoder.grid_of(one), KeyedRNG(0, 0, torch.zeros(1, dtype=torch.int64)))
    return Objective(encoder, mask, target, query, predictor, error, context)
