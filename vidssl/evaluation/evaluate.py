"""A protocol's verdict: heads fitted on train, one look at test, and the checks that keep the two apart."""

from typing import Any, NamedTuple

import numpy as np
import torch

from vidssl.core.errors import UserError
from vidssl.data.shards import Sample
from vidssl.evaluation.features import Features, TokenSource
from vidssl.evaluation.protocol import ProbeProtocol, TrainingSet, select_and_train
from vidssl.evaluation.report import outputs_text
from vidssl.evaluation.tasks import Task


def check_disjoint(train: list[Sample], test: list[Sample]) -> int:
    """No sample may be in both. -> how many test samples have a group that train has, too (the source video, say)."""
    seen = {(s.key, s.size) for s in train}
    both = [s.key for s in test if (s.key, s.size) in seen]
    if both:
        raise UserError(
            f"{len(both)} sample(s) are in train and in test, {both[0]} first: the test set must be new"
        )
    groups = {s.meta.get("group") for s in train} - {None}
    return sum(s.meta.get("group") in groups for s in test)


def check_readable(
    features: Features, samples: list[Sample], allowed: bool, name: str, section: str = "probe"
) -> None:
    """Evaluation replaces nothing: a sample that cannot be read is an error unless it may be counted as wrong.
    section: of the configuration, where that is said."""
    if features.unreadable and not allowed:
        listed = ", ".join(
            f"{samples[n].key} ({reason})" for n, reason in list(features.unreadable.items())[:3]
        )
        raise UserError(
            f"{len(features.unreadable)} {name} sample(s) cannot be decoded: {listed}; mend the data, or set "
            f"{section}.allow_unreadable=true (unreadable test samples then count as wrong and are listed)"
        )


def groups_of(samples: list[Sample], numbers: list[int]) -> list[str]:
    """A sample without a group is a group of its own."""
    return [samples[n].meta.get("group") or f"sample {samples[n].key}" for n in numbers]


class LabelledFeatures(NamedTuple):
    """A label set of one side: what heads see, the samples, their truths (None: without), and what was not read."""

    source: TokenSource
    samples: list[Sample]
    truths: list[Any]
    unreadable: dict[int, str]

    def read(self, among: list[int] | None = None) -> list[int]:
        """Numbers of the samples that were read and have a truth."""
        numbers = range(len(self.samples)) if among is None else among
        return [n for n in numbers if self.truths[n] is not None and n not in self.unreadable]


def evaluate(
    protocol: ProbeProtocol,
    task: Task,
    train: LabelledFeatures,
    test: LabelledFeatures,
    among: list[int] | None,
    device: torch.device,
) -> tuple[dict[str, Any], list[tuple[str, str, str, str, str]]]:
    """A row of results, and (key, group, truth, predicted, outputs) of every labelled test sample; unreadable ones
    count as wrong. among: the train samples that may be used (low-shot)."""
    numbers = train.read(among)
    if not numbers:
        raise UserError(f"no sample of train has a label of '{task.label}'")
    truths = [train.truths[n] for n in numbers]
    data = TrainingSet(train.source, numbers, truths, task.target(truths, device))
    model, dress, chosen = select_and_train(protocol, task, data, groups_of(train.samples, numbers))

    asked = [n for n, truth in enumerate(test.truths) if truth is not None]
    read = test.read()
    if not read:
        raise UserError(f"no sample of test has a label of '{task.label}'")
    known = [test.truths[n] for n in read]
    outputs = np.full((len(asked), task.outputs), np.nan)
    said = protocol.predict([model], dress(test.source), read, task)[0].double().numpy()
    outputs[np.isin(asked, read)] = said
    row, told = score_predictions(task, test, asked, outputs, protocol.seed)
    row |= {"n_train": len(numbers), "chosen": chosen}
    more = protocol.more(model, dress(test.source), read, task, known)
    row |= {name: round(value * len(read) / len(asked), 4) for name, value in more.items()}
    return row, told


def score_predictions(
    task: Task, test: LabelledFeatures, asked: list[int], outputs: np.ndarray, seed: int
) -> tuple[dict[str, Any], list[tuple[str, str, str, str, str]]]:
    """The figures, and the lines of predictions.csv, of outputs f64 [n, C] of the asked test samples; those of a sample
    that could not be read are NaN."""
    row = {
        "label": task.label,
        **task.figures(outputs, [test.truths[n] for n in asked], groups_of(test.samples, asked), seed),
        "n_test": len(asked),
        "unreadable": {test.samples[n].key: r for n, r in test.unreadable.items() if n in set(asked)},
    }
    told = []
    for n, output in zip(asked, outputs, strict=True):
        sample, bad = test.samples[n], bool(np.isnan(output).all())
        guess = ("", "") if bad else (task.guess(output), outputs_text(output))
        told.append((sample.key, sample.meta.get("group") or "", task.word(test.truths[n]), *guess))
    return row, told
