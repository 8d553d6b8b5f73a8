"""What isolation costs, and whether a decoder leaks: CPU seconds over all processes, and resident memory over decodes.

python tools/bench_decode.py cost SHARDS [clips=200] [rounds=3]    a clip of 16 frames, stride 4, 224 px
python tools/bench_decode.py leak SHARDS [decodes=20000] [decoder=auto]    a clip of 2 frames, cut to 16 px
"""

import os
import resource

import numpy as np

from vidssl.data.augment import RandomCrop
from vidssl.data.isolate import resident
from vidssl.data.loader import Data, TrainClips, train_batches
from vidssl.data.order import Order
from vidssl.data.shards import Shards
from vidssl.errors import UserError, run_cli


def cpu_seconds() -> float:
    """Of this process and of the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def cost(shards: Shards, clips: int, rounds: int) -> None:
    order, data = Order(shards.counts, 0), Data(["-"], frames=16, stride=4)
    used: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for isolate, seconds in used.items():
            before = cpu_seconds()
            work = TrainClips(shards, order, data, RandomCrop(224))
            for _batch in train_batches(work, 0, clips // 8, 8, 0, 1, 0, isolate):
                pass
            seconds.append((cpu_seconds() - before) / (clips // 8 * 8))
    plain, apart = (min(seconds) for seconds in used.values())
    print(f"CPU ms a clip: here {1e3 * plain:.2f}, isolated {1e3 * apart:.2f}: {100 * (apart / plain - 1):+.1f} %")


def leak(shards: Shards, decodes: int, decoder: str) -> None:
    work = TrainClips(
        shards,
        Order(shards.counts, 0),
        Data(["-"], frames=2, stride=1, decoder=decoder),
        RandomCrop(16),  # type: ignore[arg-type]
    )
    at, held = [], []
    for g in range(decodes):
        work.attempt(g, 0)
        if g % 100 == 99:
            at.append(g)
            held.append(resident(os.getpid()))
    late = len(at) // 4  # the first quarter is for warming up
    slope = np.polyfit(at[late:], held[late:], 1)[0]
    megabytes = [held[late] / 2**20, held[-1] / 2**20]
    print(f"{decoder}: {decodes} decodes; {megabytes[0]:.0f} MB after a quarter, {megabytes[1]:.0f} MB at the end")
    print(
        f"slope {slope:.0f} bytes a decode; {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MB at most"
    )


def main(argv: list[str]) -> None:
    settings = {"clips": "200", "rounds": "3", "decodes": "20000", "decoder": "auto"}
    given = dict(a.split("=", 1) for a in argv[2:])
    if len(argv) < 2 or argv[0] not in ("cost", "leak") or given.keys() - settings.keys():
        raise UserError("expected: cost|leak SHARDS [clips=200] [rounds=3] [decodes=20000] [decoder=auto]")
    settings |= given
    shards = Shards([argv[1]])
    if argv[0] == "cost":
        cost(shards, int(settings["clips"]), int(settings["rounds"]))
    else:
        leak(shards, int(settings["decodes"]), settings["decoder"])


if __name__ == "__main__":
    run_cli(main, __doc__)
