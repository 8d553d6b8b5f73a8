"""Losses of embeddings compared with the references: SIGReg, VICReg, MSN and the losses of iBOT."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from case import Case
from torch import Tensor, nn

from vidssl.objective.embedding_losses import covariance, entropy_gap, sigreg, variance_hinge
from vidssl.objective.pair_losses import ClusterCrossEntropy, SquaredDistance
from vidssl.objective.projector import Projector, Prototypes
from vidssl.pretrained.key_maps import rename

IBOT_HEAD = [
    (r"(?:student\.)?mlp\.(\d\.\w+)", r"0.\1"),
    (r"(?:student\.)?last_layer\.weight_v", "1.weight"),
    (r"(?:student\.)?last_layer\.weight_g|last_layer2.*", None),
]


def check_sigreg(case: Case) -> None:
    embeddings = case["embeddings"].requires_grad_()
    directions = F.normalize(case["directions"], dim=0)
    statistic = sigreg(embeddings, directions)
    case.compare("statistic", statistic)
    case.compare("statistic_t_max_5", sigreg(embeddings, directions, largest=5.0))
    case.compare("statistic_of_zeros", sigreg(torch.zeros_like(embeddings), directions))
    each = [[sigreg(view[None], column[:, None]).item() for column in directions.T] for view in embeddings]
    case.compare("statistic_per_view_and_direction", torch.tensor(each))
    compare_gradients(case, statistic, grad_embeddings=embeddings)


def check_vicreg(case: Case) -> None:
    a = case["a"].requires_grad_()
    b = case["b"].requires_grad_()
    both = torch.stack([a, b])
    parts = {
        "similarity": SquaredDistance()(both, both, [(0, 1), (1, 0)]),
        "variance": variance_hinge(both),
        "covariance": covariance(both),
    }
    for name, value in parts.items():
        case.compare(name, value)
    loss = 25 * parts["similarity"] + 25 * parts["variance"] + parts["covariance"]
    case.compare("loss", loss)
    compare_gradients(case, loss, grad_a=a, grad_b=b)


def check_msn(case: Case) -> None:
    tau, sharpening, views = (case.options[key] for key in ("tau", "T", "views"))
    prototypes = case.place(Prototypes(*case["prototypes"].T.shape))
    prototypes.weight.data = case["prototypes"]
    anchors = case["anchors"].requires_grad_()
    pred = prototypes(anchors.unflatten(0, (views, -1)))
    target = prototypes(case["targets"])[None]
    losses = {}
    for suffix, assign in (("", "softmax"), ("_sinkhorn", "softmax_sinkhorn")):
        loss = ClusterCrossEntropy(len(case["prototypes"]), tau, tau * sharpening, assign=assign)
        case.compare(f"assignments{suffix}", loss.assignments(target))
        losses[suffix] = loss(pred, target, [(view, 0) for view in range(views)])
        case.compare(f"loss{suffix}", losses[suffix])
    p = (pred / tau).softmax(-1)
    case.compare("entropy", -torch.xlogy(p, p).sum(-1).mean())
    case.compare("me_max", entropy_gap(p))
    total = losses["_sinkhorn"] + entropy_gap(p)
    compare_gradients(case, total, grad_anchors=anchors, grad_prototypes=prototypes.weight)


def check_ibot(case: Case) -> None:
    options = case.options
    student, student_factor = ibot_head(case, "student")
    teacher, teacher_factor = ibot_head(case, "teacher")
    pred = student(case["student_tokens"]) * student_factor  # [crops * samples, 1 + N, prototypes]
    target = teacher(case["teacher_tokens"]).detach() * teacher_factor
    case.compare("student_class", pred[:, 0])
    case.compare("student_patch", pred[:, 1:])
    case.compare("teacher_patch", target[:, 1:])
    errors = []
    temperatures = options["student_temp"], options["teacher_temp"]
    for centre in ("center", "center_patch"):
        error = case.place(ClusterCrossEntropy(len(student_factor), *temperatures))
        error.centre_momentum = options["center_momentum"]
        error.centre.copy_(case[centre].flatten())
        errors.append(error)
    of_class, of_patches = errors
    views, others = (x[:, 0].unflatten(0, (2, -1)) for x in (pred, target))
    loss_class = of_class(views, others, [(0, 1), (1, 0)])
    # the mean over the hidden tokens of a crop, then over the crops
    q = of_patches.assignments(target[:, 1:])
    each = -(q * (pred[:, 1:] / options["student_temp"]).log_softmax(-1)).sum(-1)
    hidden = case["mask"].flatten(1).float()
    loss_patch = ((each * hidden).sum(1) / hidden.sum(1).clamp_min(1)).mean()
    for name, value in (("class", loss_class), ("patch", loss_patch)):
        case.compare(f"loss_{name}", value)
    case.compare("loss", loss_class + loss_patch)
    for name, error in zip(("center", "center_patch"), errors, strict=True):
        error.update(None, 0.0)
        case.compare(f"{name}_after", error.centre)
    (loss_class + loss_patch).backward()
    gradients = {name: p.grad for name, p in student.named_parameters()}
    case.compare_gradients(lambda state: rename(state, IBOT_HEAD, case.name), gradients)


def ibot_head(case: Case, network: str) -> tuple[nn.Sequential, Tensor]:
    """The projector with its prototypes, and the factor on each cosine, f32 [prototypes]."""
    state = case.subtree(f"state.{network}")
    factor = state["last_layer.weight_g"].flatten()
    widths = [len(state[f"mlp.{i}.bias"]) for i in (0, 2, 4)]
    projector = Projector(state["mlp.0.weight"].shape[1], widths, "none", "gelu")
    head = case.place(nn.Sequential(projector, Prototypes(widths[-1], len(factor))))
    head.load_state_dict(rename(state, IBOT_HEAD, case.name).tensors)
    return head, factor.to(case.device)


def compare_gradients(case: Case, loss: Tensor, **inputs: Tensor) -> None:
    """Compares the gradients of a loss with those stored under the names of `inputs`."""
    for name, gradient in zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True):
        case.compare(name, gradient)


CHECKS: dict[str, Callable[[Case], None]] = {
    "sigreg": check_sigreg,
    "vicreg": check_vicreg,
    "msn": check_msn,
    "ibot": check_ibot,
}
