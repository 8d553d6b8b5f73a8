"""Simulates the order of a large corpus: coverage, shuffling and cost. No shard is read.

python tools/bench_order.py [shards=100000] [samples=1000] [lanes=1024] [window=4096]     (samples: in a
shard)
"""

import resource
import sys
import time

import numpy as np

from vidssl.core.errors import UserError, run_cli
from vidssl.data.order import Mixture, Order, make_order, positions_per_step

WORLDS = (1, 8, 64, 1024)


def resident_mb() -> float:
    """Returns the peak resident memory of this process, in 2**20 bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        1 << (20 if sys.platform == "darwin" else 10)
    )


def covers_epoch(order: Order, epoch: int) -> bool:
    """Returns whether the lanes of an epoch contain each sample once; 2,000 random positions are looked up
    too."""
    # index in the sequence of the epoch, by position
    e = order._layout(epoch)
    places = np.empty(order.n, np.int64)
    for lane in range(order.lanes):
        begin = int(e.lane_starts[lane])
        end = int(e.lane_starts[lane + 1])
        for w, left in enumerate(range(begin, end, order.window)):
            size = min(order.window, end - left)
            own = e.first_positions[lane] + order.lanes * (w * order.window + np.arange(size))
            places[own] = left + order._permute_window(epoch, lane, w, size).astype(np.int64)
    for p in np.random.default_rng(epoch).integers(order.n, size=2000):
        if order.locate(epoch * order.n + int(p)) != order._split_index(e, int(places[p])):
            return False
    seen = np.zeros(order.n, bool)
    seen[places] = True
    return bool(seen.all())


def same_batches(order: Order, batch: int, steps: int) -> bool:
    """Returns whether independent processes build the same global batches for any number of processes."""
    want = [sorted(order.locate(g) for g in range(s * batch, (s + 1) * batch)) for s in range(steps)]
    for world in WORLDS:
        got: list[list[tuple[int, int]]] = [[] for _ in range(steps)]
        for rank in range(world):
            own = order if world > 8 else Order(order.counts, order.seed, order.lanes, order.window)
            for step, mine in enumerate(positions_per_step(0, steps, batch, order.lanes, rank, world)):
                got[step] += [own.locate(g) for g in mine]
        if [sorted(g) for g in got] != want:
            return False
    return True


def neighbours(order: Order | Mixture, batch: int, steps: int) -> dict[str, float]:
    """Returns the distance between the shards of neighbours as a fraction of all shards, and how often they
    share one.

    batch: neighbours within a global batch; lane: one after another in a lane (of lane 0).
    """
    total = order.counts.size if isinstance(order, Order) else sum(o.counts.size for o in order.orders)
    shards = np.array([[order.locate(s * batch + j)[0] for j in range(batch)] for s in range(steps)])
    lane = np.array([order.locate(k * order.lanes)[0] for k in range(steps)])
    found = {}
    for name, apart in (("batch", np.diff(shards, axis=1)), ("lane", np.diff(lane))):
        found[f"{name}, distance"] = float(abs(apart).mean() / total)
        found[f"{name}, same shard"] = float((apart == 0).mean())
    found["shards in a batch"] = float(np.mean([len(set(row)) for row in shards.tolist()]))
    return found


def main(argv: list[str]) -> None:
    settings = {"shards": 100_000, "samples": 1000, "lanes": 1024, "window": 4096}
    given = {k: int(v) for k, v in (a.split("=", 1) for a in argv)}
    if given.keys() - settings.keys():
        raise UserError("expected: [shards=100000] [samples=1000] [lanes=1024] [window=4096]")
    shards, samples, lanes, window = (settings | given).values()
    counts = np.random.default_rng(0).integers(samples // 2, samples * 3 // 2 + 1, shards)
    before = resident_mb()
    clock = time.process_time()
    order = Order(counts, 0, lanes, window)
    order.locate(0)
    print(
        f"{order.n:,} samples in {shards:,} shards, {lanes} lanes: opened in "
        f"{time.process_time() - clock:.2f} CPU s"
    )
    clock = time.process_time()
    asked = lanes * 20
    for g in range(asked):
        order.locate(g)
    print(
        f"a process that owns all lanes holds {resident_mb() - before:.0f} MB more than before "
        f"({before:.0f} MB);"
    )
    print(f"a position costs {(time.process_time() - clock) / asked * 1e6:.1f} CPU us")
    print(f"1, 8, 64 and 1024 processes show the same global batches: {same_batches(order, 2 * lanes, 3)}")
    for what, one in (
        ("these", order),
        ("the defaults", Order(counts, 0)),
        ("a mixture", mixed(counts, lanes, window)),
    ):
        found = neighbours(one, max(256, one.lanes), 200)
        print(f"{what}: {', '.join(f'{k} {v:.4g}' for k, v in found.items())}")
    print(f"a perfect shuffle: distance {1 / 3:.4g}, same shard {1 / shards:.4g}")
    for epoch in (0, 1):
        print(f"epoch {epoch}: every sample once: {covers_epoch(order, epoch)}")


def mixed(counts: np.ndarray, lanes: int, window: int) -> Order | Mixture:
    """Returns the order of three corpora of unequal sizes with the weights of VideoMix2M (V-JEPA 2)."""
    return make_order(
        np.split(counts, [len(counts) // 5, len(counts) // 4]), [0.335, 0.1, 0.565], 0, lanes, window
    )


if __name__ == "__main__":
    run_cli(main, __doc__)
