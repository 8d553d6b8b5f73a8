"""Verdicts on a run in words, each by a rule that the page states, from the run's own files."""

from typing import Any, Literal, NamedTuple

from vidssl.evaluation.comparison import hits_of, paired_difference
from vidssl.report.evaluations import Evaluation, interval_of, read_predictions
from vidssl.report.run_files import Row, RunFiles, number, numbers
from vidssl.training.collapse import CollapseDetector

Kind = Literal["good", "bad", "warn", "info", "unknown"]
MIN_CLIPS = 8  # of a measurement that tells of a collapse, as in training
END_PART = 0.1  # of the rows, from which a mean at the start and at the end is taken
FALL = 0.05  # relative fall of the loss that counts
SOME_WAIT, MUCH_WAIT = 0.1, 0.3


class Verdict(NamedTuple):
    """A question about a run, its answer, and how it was found."""

    question: str
    answer: str
    kind: Kind
    why: str  # figures
    rule: str


def verdicts_of(run: RunFiles, evaluations: list[Evaluation], others: list[Evaluation]) -> list[Verdict]:
    """All verdicts on a run. others: evaluations of untrained encoders of the same model."""
    if run.is_fine_tuning:
        tuned = [
            accuracy_verdict(run, evaluations),
            data_verdict(run),
            epochs_verdict(run),
            numbers_verdict(run),
        ]
        return [verdict for verdict in tuned if verdict is not None]
    collapse = collapse_verdict(run)
    untrained = untrained_verdict(evaluations, others, run.missing)
    found = [
        learned_verdict(run, collapse, untrained),
        collapse,
        untrained,
        order_verdict(evaluations, run.missing),
        data_verdict(run),
        steps_verdict(run),
        numbers_verdict(run),
    ]
    return [verdict for verdict in found if verdict is not None]


def learned_verdict(run: RunFiles, collapse: Verdict, untrained: Verdict) -> Verdict:
    """Whether the encoder is of more use than before."""
    rule = (
        "Collapsed: no. Else what a probe says against the untrained encoder. Without a probe the mean "
        "loss of "
        f"the last {END_PART:.0%} of the rows against that of the first {END_PART:.0%}: a fall of {FALL:.0%} "
        "counts, but a loss alone does not show that features are of use."
    )
    question = "Has it learned?"
    fall = loss_fall(run.rows)
    text = "" if fall is None else f"The loss {'fell' if fall >= 0 else 'rose'} by {abs(fall):.0%}."
    if collapse.kind == "bad":
        return Verdict(question, "No, its features have collapsed", "bad", text, rule)
    if untrained.kind == "good":
        return Verdict(question, "Yes, by its probe", "good", f"{text} {untrained.why}".strip(), rule)
    if untrained.kind == "bad":
        return Verdict(question, "No, by its probe", "bad", f"{text} {untrained.why}".strip(), rule)
    if untrained.kind == "warn":
        return Verdict(question, "Undecided by its probe", "warn", f"{text} {untrained.why}".strip(), rule)
    if fall is None:
        return Verdict(question, "Not known", "unknown", "There is no loss to compare.", rule)
    if fall < FALL:
        return Verdict(question, "The loss has not fallen", "warn", text, rule)
    return Verdict(question, "The loss fell; no probe yet", "info", text, rule)


def accuracy_verdict(run: RunFiles, evaluations: list[Evaluation]) -> Verdict:
    """What a fine-tuned classifier reaches on test."""
    question = "How well does it classify?"
    rule = (
        "Accuracy on test, which is read once, after the last epoch, with its 95 % interval over groups of "
        "test samples: good where the whole interval is above chance."
    )
    rows = [row for e in evaluations if e.path.parent == run.folder for row in e.results]
    value = number(rows[-1].get("value")) if rows else None
    chance = number(rows[-1].get("chance")) if rows else None
    if value is None:
        return Verdict(question, "Not known yet", "unknown", "Test is read after the last epoch.", rule)
    low, high = interval_of(rows[-1])
    interval = "" if low is None or high is None else f" [{low:.1f}, {high:.1f}]"
    text = f"{rows[-1].get('label')}: {value:.1f} % of {rows[-1].get('n_test', 0):,} test samples{interval}"
    text += "." if chance is None else f", chance {chance:.1f} %."
    chosen = rows[-1].get("chosen") or {}
    if (held_out := number(chosen.get("held_out_accuracy"))) is not None:
        text += f" Epoch {chosen['epoch']} of {chosen['epochs']} was the best on held-out train"
        text += f" ({held_out:.1f} % of {chosen['n_held_out']:,})."
    is_above = low is not None and chance is not None and low > chance
    return Verdict(question, f"{value:.1f} %{interval}", "good" if is_above else "warn", text, rule)


def epochs_verdict(run: RunFiles) -> Verdict:
    """How far a fine-tuning is."""
    written = f"Last written {run.written:%Y-%m-%d %H:%M:%S}." if run.written else ""
    done = int(max(numbers(run.rows, "epoch"), default=0))
    epochs = run.section("tune").get("epochs")
    is_done = isinstance(epochs, int) and done >= epochs
    answer = f"Yes, {done:,} epochs" if is_done else f"{done:,} of {epochs} epochs, {run.last_step:,} steps"
    rule = "The epochs of log.jsonl against tune.epochs."
    return Verdict("Is it complete?", answer, "good" if is_done else "info", written, rule)


def loss_fall(rows: list[Row]) -> float | None:
    """The relative fall of the loss from the first to the last part of a run."""
    losses = numbers(rows, "loss")
    if len(losses) < 4:
        return None
    count = max(1, int(len(losses) * END_PART))
    start = sum(losses[:count]) / count
    end = sum(losses[-count:]) / count
    return (start - end) / abs(start) if start else None


def statistics_of(row: Row) -> dict[str, float] | None:
    """The feature statistics of a row that tells of a collapse."""
    found = {
        name.removeprefix("feature_"): value
        for name, raw in row.items()
        if name.startswith("feature_") and (value := number(raw)) is not None
    }
    needed = ("std_clips", "participation", "rank", "channel_evenness", "std_tokens", "cosine", "std_time")
    if found.get("clips", MIN_CLIPS) < MIN_CLIPS or any(name not in found for name in needed):
        return None
    return found


def collapse_spans(rows: list[Row]) -> tuple[list[tuple[int, int]], str]:
    """Spans of steps in which the features look collapsed, and what was seen in the last one."""
    detector = CollapseDetector()
    spans: list[tuple[int, int]] = []
    text = ""
    was_collapsed = False
    for row in rows:
        if (stats := statistics_of(row)) is None:
            continue
        detector.add(stats)
        if detector.collapsed:
            start = spans.pop()[0] if was_collapsed else row["step"]
            spans.append((start, row["step"]))
            text = (detector.warning() or text).removeprefix("the features have collapsed: ")
        was_collapsed = detector.collapsed
    return spans, text


def collapse_verdict(run: RunFiles) -> Verdict:
    question = "Have its features collapsed?"
    rule = (
        "Two measurements in a row below a fixed bound and below a part of the run's best: spread over "
        "clips, rank, participation, evenness of channels, spread over tokens and time, as in training."
    )
    measured = [row for row in run.rows if statistics_of(row) is not None]
    if not measured:
        text = "The log has no feature statistics (run.feature_stats_every)."
        return Verdict(question, "Not known", "unknown", text, rule)
    spans, text = collapse_spans(run.rows)
    rank = f"Rank {measured[-1]['feature_rank']:.3g} at step {measured[-1]['step']:,}"
    if not spans:
        best = max(numbers(measured, "feature_rank"))
        return Verdict(
            question, "No", "good", f"{rank}, at most {best:.3g}; {len(measured)} measurements.", rule
        )
    start, end = spans[-1]
    if end == measured[-1]["step"]:
        return Verdict(question, f"Yes, from step {start:,} on", "bad", f"{capital(text)}.", rule)
    answer = f"For a time: steps {start:,} to {end:,}"
    return Verdict(question, answer, "warn", f"{capital(text)}. {rank}.", rule)


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


class Comparison(NamedTuple):
    """A figure beside that of a control: difference with its interval, in the metric's unit."""

    label: str
    value: float
    other: float
    difference: float
    low: float | None
    high: float | None

    def text(self) -> str:
        # R2 is a part, the other metrics are percent
        digits = 3 if abs(self.value) <= 1 and abs(self.other) <= 1 else 1
        interval = "" if self.low is None else f" [{self.low:+.{digits}f}, {self.high:+.{digits}f}]"
        values = f"{self.value:.{digits}f} against {self.other:.{digits}f}"
        return f"{self.label}: {values} ({self.difference:+.{digits}f}{interval})"


def compare_with(
    evaluations: list[Evaluation], control: str, others: list[Evaluation], missing: list[str]
) -> list[Comparison]:
    """For each label of the last probe on unchanged clips, on each data set, the comparison with a control:
    of that probe, else, for untrained encoders, of `others` that were probed alike on the same data."""
    latest: dict[tuple[str, str, str], tuple[Evaluation, Row]] = {}
    for evaluation in evaluations:
        if evaluation.is_untrained or evaluation.is_dense:
            continue
        for row in evaluation.results:
            if row.get("control", "none") == "none" and "train_fraction" not in row:
                key = (str(row.get("label")), str(row.get("protocol")), evaluation.setting)
                latest[key] = (evaluation, row)
    found = []
    for (label, protocol, setting), (evaluation, row) in latest.items():
        # on the same data, and probed alike
        alike = (other for other in others if other.setting == setting)
        name = label if sum(key[0] == label for key in latest) == 1 else f"{label} ({evaluation.name})"
        for place, other_control in [(evaluation, control), *((other, "none") for other in alike)]:
            other_row = find_row(place, label, protocol, other_control)
            if other_row is not None:
                comparison = one_comparison(evaluation, row, place, other_row, other_control, missing)
                found += [one._replace(label=name) for one in comparison]
                break
    return found


def find_row(evaluation: Evaluation, label: str, protocol: str, control: str) -> Row | None:
    """The row of all of train under a control."""
    for row in evaluation.results:
        same = (str(row.get("label")), str(row.get("protocol")), row.get("control", "none"))
        if same == (label, protocol, control) and "train_fraction" not in row:
            return row
    return None


def one_comparison(
    evaluation: Evaluation, row: Row, other: Evaluation, other_row: Row, control: str, missing: list[str]
) -> list[Comparison]:
    """The comparison of two rows of one label; paired where both have predictions of the same samples."""
    value, base = number(row.get("value")), number(other_row.get("value"))
    if value is None or base is None or row.get("metric") != other_row.get("metric"):
        return []
    label = str(row.get("label"))
    if row.get("metric") == "top1":
        mine = hits_of(read_predictions(evaluation, missing).get((label, "none", "", ""), []))
        theirs = hits_of(read_predictions(other, missing).get((label, control, "", ""), []))
        if mine and mine.keys() == theirs.keys():
            return [Comparison(label, value, base, *paired_difference(mine, theirs))]
    low, high = interval_of(row)
    other_low, other_high = interval_of(other_row)
    if low is None or high is None or other_low is None or other_high is None:
        return [Comparison(label, value, base, value - base, None, None)]
    # Of intervals that are not paired the outermost differences
    return [Comparison(label, value, base, value - base, low - other_high, high - other_low)]


def untrained_verdict(evaluations: list[Evaluation], others: list[Evaluation], missing: list[str]) -> Verdict:
    """Whether the encoder is better than before training."""
    question = "Is it better than its untrained self?"
    rule = (
        "The last probe on unchanged clips minus the same probe of the untrained encoder (control "
        "random_init, or a probe with random_init=true of the same model), paired over test samples where "
        "both list their predictions: yes where the whole 95 % interval is above 0, no where it is below."
    )
    untrained = [*(e for e in evaluations if e.is_untrained), *others]
    found = compare_with(evaluations, "random_init", untrained, missing)
    if not found:
        has_probe = any(not e.is_untrained and not e.is_dense for e in evaluations)
        text = "No probe of the untrained encoder was found." if has_probe else "No probe was found."
        advice = " Add probe.controls=[none, random_init] to the probe."
        return Verdict(question, "Not known", "unknown", text + advice, rule)
    better = [c for c in found if c.low is not None and c.low > 0]
    worse = [c for c in found if c.high is not None and c.high < 0]
    text = "; ".join(c.text() for c in found) + "."
    if worse:
        names = ", ".join(c.label for c in worse)
        return Verdict(question, f"No, beaten on {names}", "bad", text, rule)
    if len(better) == len(found):
        return Verdict(question, "Yes", "good", text, rule)
    if better:
        names = ", ".join(c.label for c in better)
        return Verdict(question, f"On {names}; undecided on the rest", "warn", text, rule)
    return Verdict(question, "Undecided", "warn", text, rule)


def order_verdict(evaluations: list[Evaluation], missing: list[str]) -> Verdict | None:
    """Whether the probe uses the order of the frames; None without the control."""
    found = compare_with(evaluations, "shuffled", [], missing)
    if not found:
        return None
    rule = (
        "Unchanged clips minus clips whose frames are shuffled, paired over test samples: the order is of "
        "use where the whole 95 % interval is above 0."
    )
    used = [c.label for c in found if c.low is not None and c.low > 0]
    answer = f"On {', '.join(used)}" if used else "No label shows it"
    return Verdict(
        "Does it use the order of the frames?", answer, "info", "; ".join(c.text() for c in found) + ".", rule
    )


def data_verdict(run: RunFiles) -> Verdict:
    question = "Is it bound by the data?"
    rule = (
        f"Mean part of a step in which it waits for clips, over the second half of the rows: below "
        f"{SOME_WAIT:.0%} no, from {MUCH_WAIT:.0%} on yes."
    )
    waits = numbers(run.rows, "wait")
    waits = waits[len(waits) // 2 :]
    if not waits:
        return Verdict(question, "Not known", "unknown", "The log has no waiting times.", rule)
    share = sum(waits) / len(waits)
    rates = numbers(run.rows[len(run.rows) // 2 :], "clips_per_s")
    rate = f", {sum(rates) / len(rates):,.1f} clips/s" if rates else ""
    text = f"{share:.0%} of the time goes to waiting{rate}."
    if share < SOME_WAIT:
        return Verdict(question, "No", "good", text, rule)
    advice = " efficiency.workers, data.cache=host or smaller videos help."
    if share < MUCH_WAIT:
        return Verdict(question, "In part", "warn", text + advice, rule)
    return Verdict(question, "Yes", "bad", text + advice, rule)


def steps_verdict(run: RunFiles) -> Verdict:
    """How far the run is."""
    written = f"Last written {run.written:%Y-%m-%d %H:%M:%S}." if run.written else ""
    rule = "The last row of log.jsonl against run.steps."
    question = "Is it complete?"
    if run.steps is None:
        return Verdict(question, f"{run.last_step:,} steps so far", "info", written, rule)
    if run.last_step >= run.steps:
        return Verdict(question, f"Yes, {run.steps:,} steps", "good", written, rule)
    percent = 100 * run.last_step // run.steps
    answer = f"{run.last_step:,} of {run.steps:,} steps ({percent}%)"
    return Verdict(question, answer, "info", written, rule)


def numbers_verdict(run: RunFiles) -> Verdict | None:
    """Whether steps were skipped or samples replaced."""
    if not run.rows:
        return None
    skipped = int(max(numbers(run.rows, "skipped"), default=0))
    reasons = dict.fromkeys(str(row["skip_reason"]) for row in run.rows if row.get("skip_reason"))
    replaced = int(sum(numbers(run.rows, "undecodable_samples")))
    rule = "`skipped` and `undecodable_samples` of log.jsonl."
    question = "Were steps or samples lost?"
    parts = [
        *([f"{skipped:,} of {run.last_step:,} steps skipped"] if skipped else []),
        *([f"{replaced:,} samples replaced, see bad_samples.jsonl"] if replaced else []),
    ]
    if not parts:
        return Verdict(question, "No", "good", "No step was skipped, no sample replaced.", rule)
    return Verdict(question, "; ".join(parts), "warn", "; ".join(reasons), rule)


def as_plain(verdicts: list[Verdict]) -> list[dict[str, Any]]:
    return [verdict._asdict() for verdict in verdicts]
