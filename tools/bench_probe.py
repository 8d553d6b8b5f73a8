"""Compares probing stored features with decoding and encoding in every epoch, in CPU seconds.

    python tools/bench_probe.py encoder=RUN data.train=SHARDS data.test=SHARDS probe.heads=3 [--stream-epochs
    2]

Kept: every video is decoded and encoded once; the grid is trained on a part of train, the chosen head again
on all. Streamed: the grid is trained once over all of train, each epoch's batches being decoded and encoded
again, and test is read once, or (the published practice) after every epoch. Both with one process, one thread
and no workers, on the same videos and heads. Fewer --stream-epochs than epochs are extrapolated in a line,
which is said.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from vidssl.config import load_config
from vidssl.core.errors import UserError, run_cli
from vidssl.data.shards import Shards
from vidssl.evaluation.evaluate import groups_of
from vidssl.evaluation.features import FeatureLoader, compute_features
from vidssl.evaluation.metrics import accuracy, bootstrap_ci
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.evaluation.probe_data import make_view
from vidssl.evaluation.protocol import TrainingSet, select_and_train
from vidssl.evaluation.splits import label_sets, labelled
from vidssl.evaluation.tasks import make_task
from vidssl.pretrained.load import load_encoder
from vidssl.probe import make_extractor

DEFAULTS = {
    "probe.kind": "attentive",
    "probe.epochs": "20",
    "probe.segments": "2",
    "probe.lr": "[5e-3,3e-3,1e-3,3e-4,1e-4]",
    "probe.weight_decay": "[0.01,0.1,0.4,0.8]",
    "probe.workers": "0",
    "out": "unused",
}


def timed(action: Callable[[], Any]) -> tuple[float, Any]:
    """Returns CPU seconds of this process, and the result."""
    began = time.process_time()
    result = action()
    return time.process_time() - began, result


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(prog="bench_probe", description=__doc__.split("\n")[0])
    p.add_argument("settings", nargs="+", metavar="KEY=VALUE", help="as for vidssl/probe.py")
    p.add_argument("--stream-epochs", type=int, help="epochs that are really streamed (default: all)")
    a = p.parse_args(argv)
    torch.set_num_threads(1)
    given = {s.split("=")[0] for s in a.settings}
    defaults = [f"{k}={v}" for k, v in DEFAULTS.items() if k not in given]
    cfg = load_config([*a.settings, *defaults], ProbeConfig)
    data = cfg.data
    protocol = cfg.probe.build()
    streamed_epochs = a.stream_epochs or protocol.epochs
    if not 0 < streamed_epochs <= protocol.epochs:
        raise UserError(f"--stream-epochs {streamed_epochs}: expected 1 to {protocol.epochs}")
    accelerator = Accelerator(cpu=True)
    loaded = load_encoder(cfg.encoder)
    shards = {"train": Shards(data.train), "test": Shards(data.test)}
    label = label_sets(shards["train"], shards["test"], data.labels)[0]
    samples = {name: labelled(part, [label]) for name, part in shards.items()}
    task, *truths = make_task(
        label, shards["train"].classes[label], samples["train"], samples["test"], "class"
    )
    eye = make_extractor(lambda seed: loaded, loaded, "none", protocol.seed, accelerator)
    view = make_view(data, protocol, loaded, "none")
    feeds = {
        n: FeatureLoader(eye.encode, shards[n], samples[n], view, accelerator, protocol, n) for n in shards
    }
    numbers = {name: list(range(len(part))) for name, part in samples.items()}
    target = task.target(truths[0], accelerator.device)

    def score(models: list[Any], source: Any) -> list[Any]:
        """Returns whether each head is right, bool [n] for every head."""
        outputs = protocol.predict(models, source, numbers["test"], task)
        return [output.argmax(1).numpy() == truths[1] for output in outputs]

    def seen(where: str) -> dict[str, Any]:
        shape = feeds["train"].shape()
        return {
            n: compute_features(f, shape._replace(samples=len(numbers[n])), where, {}).source
            for n, f in feeds.items()
        }

    encoding, kept = timed(lambda: seen("memory"))
    train = TrainingSet(kept["train"], numbers["train"], truths[0], target)
    groups = groups_of(samples["train"], numbers["train"])
    heads, (model, dress, chosen) = timed(lambda: select_and_train(protocol, task, train, groups))
    testing, (right,) = timed(lambda: score([model], dress(kept["test"])))
    grid = protocol.grid()
    full = protocol.epochs
    short = dataclasses.replace(protocol, epochs=streamed_epochs)
    stream = seen("stream")
    epochs, models = timed(lambda: short.train(task, train._replace(source=stream["train"]), grid))
    test_again, hits = timed(lambda: score(models, stream["test"]))
    total = encoding + heads + testing
    other = epochs * full / streamed_epochs + test_again
    published = other + (full - 1) * test_again
    report = {
        "videos": {n: len(v) for n, v in numbers.items()},
        "heads": len(grid),
        "epochs": full,
        "kept_s": {"decode_encode_once": encoding, "heads": heads, "test": testing, "total": total},
        "streamed_s": {"epochs_measured": streamed_epochs, "measured": epochs, "test": test_again},
        "streamed_total_s": {"test_once": other, "test_every_epoch": published},
        "extrapolated": streamed_epochs < full,
        "share": {"test_once": total / other, "test_every_epoch": total / published},
        "accuracy_kept": [accuracy(right), bootstrap_ci(right, groups_of(samples["test"], numbers["test"]))],
    }
    if streamed_epochs == full:  # the head of the setting that was chosen on held-out train
        same = next(i for i, s in enumerate(grid) if all(chosen[k] == v for k, v in s.items()))
        report["accuracy_streamed"] = accuracy(hits[same])
    print(json.dumps(report, indent=1, default=float))
    said = f"extrapolated from {streamed_epochs} of {full} epochs" if report["extrapolated"] else "measured"
    print(
        f"kept: {total:.0f} CPU s; streamed ({said}), test once: {other:.0f}, share {total / other:.3f};",
        end=" ",
    )
    print(f"test every epoch: {published:.0f}, share {total / published:.3f}")


if __name__ == "__main__":
    run_cli(main)
