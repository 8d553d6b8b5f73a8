"""Measures the CPU cost of decoding in a child process, and the growth of resident memory over many decodes.

python tools/bench_decode.py cost SHARDS [clips=400]    a clip of 16 frames, stride 4, 224 px
python tools/bench_decode.py leak SHARDS [decodes=20000] [decoder=auto]    a clip of 2 frames, cut to 16 px
"""

import os
import resource

import numpy as np
import psutil

from vidssl.core.errors import UserError, run_cli
from vidssl.data.augment import RandomCrop
from vidssl.data.dataset import MultiStreamDataset, TrainClips
from vidssl.data.isolated_dataset import IsolatedDataset
from vidssl.data.isolation import rss_bytes
from vidssl.data.order import Order
from vidssl.data.schema import DataConfig
from vidssl.data.shards import Shards

BLOCK = 8  # clips that the two ways take in turn, so that a slower hour of the machine meets both


def cpu_seconds(*processes: psutil.Process) -> float:
    return sum(sum(p.cpu_times()[:2]) for p in processes)


def cost(shards: Shards, clips: int) -> None:
    """Decodes the same clips here and in a child process in turns; the start of the child is not counted."""
    clip = TrainClips(
        shards, Order(shards.counts, 0), DataConfig(["-"], frames=16, stride=4), RandomCrop(224)
    )
    isolated = IsolatedDataset(MultiStreamDataset([clip]), 60, 4 << 30)
    isolated.try_position(0, 0)
    here = psutil.Process()
    both = (here, psutil.Process(isolated.sandbox.pid))
    used: dict[str, list[float]] = {"here": [], "isolated": []}
    for start in range(0, clips, BLOCK):
        ways = [("here", clip, (here,)), ("isolated", isolated, both)]
        for name, way, processes in ways[:: 1 if start // BLOCK % 2 else -1]:
            before = cpu_seconds(*processes)
            for g in range(start, start + BLOCK):
                way.try_position(g, 0)
            used[name].append((cpu_seconds(*processes) - before) / BLOCK)
    isolated.close()
    plain, apart = (1e3 * np.array(seconds) for seconds in used.values())
    spread = (apart - plain).std(ddof=1) / len(plain) ** 0.5
    print(f"CPU ms a clip: here {plain.mean():.2f}, isolated {apart.mean():.2f};", end=" ")
    difference = (apart - plain).mean()
    print(f"difference {difference:.2f} +- {spread:.2f}: {100 * difference / plain.mean():+.1f} %")


def leak(shards: Shards, decodes: int, decoder: str) -> None:
    work = TrainClips(
        shards,
        Order(shards.counts, 0),
        DataConfig(["-"], frames=2, stride=1, decoder=decoder),
        RandomCrop(16),  # type: ignore[arg-type]
    )
    at, held = [], []
    for g in range(decodes):
        work.try_position(g, 0)
        if g % 100 == 99:
            at.append(g)
            held.append(rss_bytes(os.getpid()))
    late = len(at) // 4  # the first quarter is for warming up
    slope = np.polyfit(at[late:], held[late:], 1)[0]
    megabytes = [held[late] / 2**20, held[-1] / 2**20]
    print(
        f"{decoder}: {decodes} decodes; {megabytes[0]:.0f} MB after a quarter, {megabytes[1]:.0f} "
        f"MB at the end"
    )
    print(
        f"slope {slope:.0f} bytes a decode; "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MB at most"
    )


def main(argv: list[str]) -> None:
    settings = {"clips": "400", "decodes": "20000", "decoder": "auto"}
    given = dict(a.split("=", 1) for a in argv[2:])
    if len(argv) < 2 or argv[0] not in ("cost", "leak") or given.keys() - settings.keys():
        raise UserError("expected: cost|leak SHARDS [clips=400] [decodes=20000] [decoder=auto]")
    settings |= given
    shards = Shards([argv[1]])
    if argv[0] == "cost":
        cost(shards, int(settings["clips"]))
    else:
        leak(shards, int(settings["decodes"]), settings["decoder"])


if __name__ == "__main__":
    run_cli(main, __doc__)
