"""training/step.py and the measurements of a step: seeds, hash of the samples, waiting time."""

import time

import torch

from vidssl.data.loader import Batch
from vidssl.training.metrics_log import count_samples, samples_hash
from vidssl.training.perf import Throughput
from vidssl.training.step import seed_step


def draws(seed: int, step: int, position: int) -> list[float]:
    seed_step(seed, step, position)
    return torch.rand(3).tolist()


def test_seed_step_is_a_function_of_its_arguments():
    assert draws(0, 3, 16) == draws(0, 3, 16)
    runs = [[draws(seed, step, 8 * step) for step in range(50)] for seed in range(4)]
    values = [tuple(d) for run in runs for d in run]
    assert len(set(values)) == len(values)  # no step of a run repeats one of another seed
    assert draws(0, 3, 16) != draws(0, 3, 20)


def batch(positions: list[int], keys: list[str]) -> Batch:
    n = len(keys)
    return Batch(torch.empty(n, 3, 1, 1, 1), torch.zeros(n), torch.tensor(positions), keys, [])


def test_samples_hash_depends_on_the_samples_only():
    whole = count_samples([batch([0, 1, 2, 3], ["a", "b", "c", "d"])])
    halves = [count_samples([batch([2, 0], ["c", "a"])]), count_samples([batch([1, 3], ["b", "d"])])]
    summed = {name: float(halves[0][name] + halves[1][name]) for name in whole}
    assert samples_hash(summed) == samples_hash(whole) and len(samples_hash(whole)) == 16
    exchanged = count_samples([batch([1, 0, 2, 3], ["a", "b", "c", "d"])])
    assert samples_hash(exchanged) != samples_hash(whole)


def test_wait_is_only_the_time_in_the_loader():
    def loader():
        for _ in range(3):
            time.sleep(0.02)
            yield None

    throughput = Throughput(torch.device("cpu"), "fp32", clips=8, counts_flops=False)
    rows = []
    for _ in throughput.timed(loader()):
        time.sleep(0.02)  # the step
        rows.append(throughput.row())
        time.sleep(0.2)  # diagnostics and checkpoints
    assert all(0.2 < row["wait"] < 0.8 for row in rows)
    assert all(8 / 0.2 < row["clips_per_s"] < 8 / 0.04 for row in rows)
