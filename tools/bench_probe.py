r"""Compares probing stored features with decoding and encoding in every epoch, in CPU seconds.

    python tools/bench_probe.py encoder=RUN data.train=SHARDS data.test=SHARDS probe.heads=3 \
        [--stream-epochs 2]

Stored: every video is decoded and encoded once; the grid is trained on a part of train, the selected head
again on all. Streamed: the grid is trained once over all of train, with the batches of each epoch decoded and
encoded again, and test is read once, or (the published practice) after every epoch. Both with one process,
one thread and no workers, on the same videos and heads. Fewer --stream-epochs than epochs are extrapolated
linearly; the output states it. """

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
from vidssl.evaluation.evaluate import groups_of
from vidssl.evaluation.extractor import make_extractor
from vidssl.evaluation.features import FeatureLoader, Location, TokenSource, compute_features
from vidssl.evaluation.metrics import accuracy, bootstrap_ci
from vidssl.evaluation.probe_config import ProbeConfig
from vidssl.evaluation.probe_data import make_view, open_probe_splits
from vidssl.evaluation.protocol import TrainingSet, select_and_train
from vidssl.pretrained.load import load_encoder

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
    """Returns the CPU seconds of this process, and the result."""
    start = time.process_time()
    result = action()
    return time.process_time() - start, result


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
    epochs = protocol.epochs
    stream_epochs = a.stream_epochs or epochs
    if not 0 < stream_epochs <= epochs:
        raise UserError(f"--stream-epochs {stream_epochs}: expected 1 to {epochs}")
    accelerator = Accelerator(cpu=True)
    loaded = load_encoder(cfg.encoder)
    splits, label_sets, _ = open_probe_splits(data)
    task, labels = next(iter(label_sets.values()))
    encode = make_extractor(lambda seed: loaded, loaded, "none", protocol.seed, accelerator).encode
    view = make_view(data, protocol, loaded, "none")
    indices = {name: list(range(len(split.samples))) for name, split in splits.items()}

    def features(where: Location) -> dict[str, TokenSource]:
        sources = {}
        for name, split in splits.items():
            loader = FeatureLoader(encode, *split, view, accelerator, protocol, name)
            sources[name] = compute_features(loader, loader.shape(), where).source
        return sources

    def hits(models: list[Any], source: TokenSource) -> list[Any]:
        """bool [n] on test for each head."""
        outputs = protocol.predict(models, source, indices["test"], task)
        return [output.argmax(1).numpy() == labels["test"] for output in outputs]

    encode_s, stored = timed(lambda: features("memory"))
    target = task.label_tensor(labels["train"], accelerator.device)
    train = TrainingSet(stored["train"], indices["train"], labels["train"], target)
    groups = {name: groups_of(split.samples) for name, split in splits.items()}
    heads_s, probe = timed(lambda: select_and_train(protocol, task, train, groups["train"]))
    test_s, (correct,) = timed(lambda: hits([probe.model], probe.apply_standardisation(stored["test"])))

    grid = protocol.hyperparameters()
    short = dataclasses.replace(protocol, epochs=stream_epochs)
    streamed = features("recompute")
    stream_s, models = timed(lambda: short.train(task, train._replace(source=streamed["train"]), grid))
    stream_test_s, stream_hits = timed(lambda: hits(models, streamed["test"]))

    total = encode_s + heads_s + test_s
    test_once = stream_s * epochs / stream_epochs + stream_test_s
    test_every_epoch = test_once + (epochs - 1) * stream_test_s
    report = {
        "videos": {name: len(split.samples) for name, split in splits.items()},
        "heads": len(grid),
        "epochs": epochs,
        "stored_s": {"decode_encode_once": encode_s, "heads": heads_s, "test": test_s, "total": total},
        "streamed_s": {"epochs_measured": stream_epochs, "measured": stream_s, "test": stream_test_s},
        "streamed_total_s": {"test_once": test_once, "test_every_epoch": test_every_epoch},
        "extrapolated": stream_epochs < epochs,
        "ratio": {"test_once": total / test_once, "test_every_epoch": total / test_every_epoch},
        "accuracy_stored": [accuracy(correct), bootstrap_ci(correct, groups["test"])],
    }
    if stream_epochs == epochs:  # the head of the setting that was selected on held-out train
        selected = next(
            i for i, setting in enumerate(grid) if all(probe.selection[k] == v for k, v in setting.items())
        )
        report["accuracy_streamed"] = accuracy(stream_hits[selected])
    print(json.dumps(report, indent=1, default=float))
    how = f"extrapolated from {stream_epochs} of {epochs} epochs" if stream_epochs < epochs else "measured"
    print(f"stored: {total:.0f} CPU s; streamed ({how}):")
    print(f"  test once: {test_once:.0f} CPU s, ratio {total / test_once:.3f}")
    print(f"  test every epoch: {test_every_epoch:.0f} CPU s, ratio {total / test_every_epoch:.3f}")


if __name__ == "__main__":
    run_cli(main)
