"""Linear models on fixed features: ridge regression in closed form, and any loss by L-BFGS."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

LBFGS_ITERATIONS = 500  # at most
LBFGS_TOLERANCE = 1e-5  # of the largest entry of the gradient


def ridge_regression(features: Tensor, targets: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """The minimum of mean |X W + b - Y|^2 + l2 * |W|^2, in f64; the bias is not penalised.

    features [n, D], targets [n, C] -> weight f64 [D, C], bias f64 [C].
    """
    x, y = features.double(), targets.double()
    x_mean, y_mean = x.mean(0), y.mean(0)
    x = x - x_mean
    n, width = x.shape
    if l2 == 0:  # the solution of the smallest norm
        weight = torch.linalg.lstsq(x.cpu(), (y - y_mean).cpu(), driver="gelsd").solution.to(x.device)
    elif width <= n:
        gram = x.T @ x + l2 * n * torch.eye(width, dtype=x.dtype, device=x.device)
        weight = torch.linalg.solve(gram, x.T @ (y - y_mean))
    else:  # the same by the smaller matrix
        gram = x @ x.T + l2 * n * torch.eye(n, dtype=x.dtype, device=x.device)
        weight = x.T @ torch.linalg.solve(gram, y - y_mean)
    return weight, y_mean - x_mean @ weight


def ridge_predict(
    train_features: Tensor, train_targets: Tensor, test_features: Tensor, l2: tuple[float, ...]
) -> Tensor:
    """Ridge regression on targets [n, C] (one-hot classes, say) -> predictions f64 [m, C].

    Of several values of l2 the one with the most correct argmaxes on every fourth train sample is used.
    """
    held_out = torch.arange(len(train_features), device=train_features.device) % 4 == 3

    def score(value: float) -> float:
        weight, bias = ridge_regression(train_features[~held_out], train_targets[~held_out], value)
        predicted = train_features[held_out].double() @ weight + bias
        return float((predicted.argmax(1) == train_targets[held_out].argmax(1)).double().mean())

    best = max(l2, key=score) if len(l2) > 1 else l2[0]
    weight, bias = ridge_regression(train_features, train_targets, best)
    return test_features.double() @ weight + bias


def minimise(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Minimises loss() over the parameters of `model` by L-BFGS with a strong Wolfe line search."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=LBFGS_ITERATIONS,
        max_eval=2 * LBFGS_ITERATIONS,
        tolerance_grad=LBFGS_TOLERANCE,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
