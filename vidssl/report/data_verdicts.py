"""Verdicts on data sets in words, each by a rule that the page states, from their own files."""

from collections.abc import Iterator, Sequence
from itertools import combinations

from vidssl.core.suggestions import counted
from vidssl.data.metadata import group_in
from vidssl.report.data_sets import DataSet
from vidssl.report.run_files import Row
from vidssl.report.verdicts import Verdict

MUCH_REJECTED = 0.1  # fraction of the files
UNEVEN = 5.0  # samples of the largest class over those of the smallest
FEW = 10  # samples of a class
NAMED = 3  # classes or groups in a sentence


def verdicts_of_set(one: DataSet, found: Row | None) -> list[Verdict]:
    """Verdicts on a data set. found: what the search for near duplicates has found; None: there was none."""
    verdicts = [rejected_verdict(one), *classes_verdicts(one), groups_verdict(one), oddities_verdict(one)]
    return [verdict for verdict in (*verdicts, duplicates_verdict(one, found)) if verdict is not None]


def rejected_verdict(one: DataSet) -> Verdict | None:
    if one.is_scanned:
        return None
    question = "Was anything left out?"
    rule = f"rejected.jsonl; a warning from {MUCH_REJECTED:.0%} of the files on."
    counts = one.report.get("rejected") or {}
    lost = sum(counts.values())
    if not lost:
        return Verdict(question, "No", "good", "Every file is in the shards.", rule)
    part = lost / max(1, lost + one.size)
    why = ", ".join(f"{reason} {n:,}" for reason, n in counts.items()) + "."
    answer = f"{counted(lost, 'file')} or clips, {part:.0%}"
    return Verdict(question, answer, "warn" if part >= MUCH_REJECTED else "info", why, rule)


def classes_verdicts(one: DataSet) -> Iterator[Verdict]:
    """A verdict on all label sets: whether their classes are of like size."""
    sets = {name: sizes for name, sizes in (one.report.get("classes") or {}).items() if sizes}
    question = "Are its classes of like size?"
    rule = (
        f"No class is empty; the largest has at most {UNEVEN:g} times the smallest, which has {FEW} or more."
    )
    if not sets:
        yield Verdict("Is it labelled?", "No", "info", "No sample has a label.", "The index names no class.")
        return
    lines = []
    is_even = True
    for name, sizes in sets.items():
        present = {key: n for key, n in sizes.items() if n}
        empty = [key for key, n in sizes.items() if not n]
        text = f"{name}: {counted(len(sizes), 'class', 'es')}"
        if present:
            largest = max(present, key=lambda key: present[key])
            smallest = min(present, key=lambda key: present[key])
            same = present[largest] == present[smallest]
            text += f" of {present[largest]:,}" if same else ""
            text += "" if same else f", {largest} {present[largest]:,} to {smallest} {present[smallest]:,}"
            is_even &= present[largest] <= UNEVEN * present[smallest] and present[smallest] >= FEW
        if empty:
            text += f", {len(empty)} without a sample ({named(empty)})"
        is_even &= not empty
        lines.append(text)
    yield Verdict(
        question, "Yes" if is_even else "No", "good" if is_even else "warn", "; ".join(lines) + ".", rule
    )


def named(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")


def groups_verdict(one: DataSet) -> Verdict | None:
    groups, alone = one.summary.get("groups"), one.summary.get("without_group")
    if groups is None or not one.size:
        return None
    question = "Does it say which clips are of one recording?"
    rule = "summary.json: groups are never split over train and held-out clips; a clip without one is alone."
    if not groups:
        why = "Clips of one recording may be split; then accuracies are too high. labels.csv takes groups."
        return Verdict(question, "No", "warn", why, rule)
    why = f"{groups:,} groups, the largest of {counted(one.summary.get('largest_group', 0), 'sample')}."
    if alone:
        return Verdict(question, f"Not of {counted(alone, 'sample')}", "warn", why, rule)
    return Verdict(question, "Yes", "good", why, rule)


def oddities_verdict(one: DataSet) -> Verdict | None:
    """What pack had to mend, and files whose frame rate is far from the others'."""
    lines = [
        f"time stamps {reason}: {entry['files']:,}"
        for reason, entry in (one.summary.get("time_repairs") or {}).items()
    ]
    lines += [
        f"{fact}: {counted(entry['files'], 'file')}"
        for fact, entry in (one.summary.get("display") or {}).items()
    ]
    for name, unit in (("fps", "frame rate"), ("duration", "duration")):
        found = one.report.get(name) or {}
        if outliers := found.get("outliers"):
            lines.append(
                f"{counted(outliers, 'outlier')} in {unit} ({found['min']:.4g} to {found['max']:.4g}, "
                f"median {found['median']:.4g})"
            )
    lines += [str(note) for note in one.summary.get("notes") or []]
    lines += [
        f"not read, {reason}: {entry['files']:,}"
        for reason, entry in (one.summary.get("ignored") or {}).items()
    ]
    if not one.summary and not lines:
        return None
    rule = "summary.json: repaired times, what players are asked to do, notes; outliers of report.json."
    question = "Is anything odd in its files?"
    if not lines:
        return Verdict(question, "No", "good", "", rule)
    return Verdict(question, counted(len(lines), "note"), "info", "; ".join(lines) + ".", rule)


def duplicates_verdict(one: DataSet, found: Row | None) -> Verdict | None:
    if found is None:
        return None
    question = "Does it show the same twice?"
    pairs = found["pairs"].get(one.name, 0)
    searched = found["searched"].get(one.name, 0)
    why = f"{searched:,} of {one.size:,} videos were compared with each other."
    if found["undecided"]:
        why += f" {counted(found['undecided'], 'pair')} that look alike could not be compared any more."
    rule = (
        "The rule of vidssl pack --drop-duplicates near: what moves correlates by 0.985 or more, in most of "
        "a video; where little moves, pictures are alike."
    )
    if pairs:
        return Verdict(question, f"Yes, {counted(pairs, 'pair')}", "warn", why, rule)
    answer = "No" if searched >= one.size else "None found"
    return Verdict(question, answer, "good" if searched >= one.size else "info", why, rule)


def verdicts_between(sets: Sequence[DataSet], found: Row | None) -> list[Verdict]:
    """Verdicts on several data sets together."""
    if len(sets) < 2:
        return []
    return [
        *shared_groups_verdict(sets),
        *classes_of_both(sets),
        *leaks_verdict(sets, found),
    ]


def shared_groups_verdict(sets: Sequence[DataSet]) -> Iterator[Verdict]:
    groups = {
        one.name: {group for s in one.samples if (group := group_in(s.meta)) is not None} for one in sets
    }
    if not any(groups.values()):
        return
    lines = []
    for a, b in combinations(groups, 2):
        if shared := sorted(groups[a] & groups[b]):
            lines.append(f"{counted(len(shared), 'group')} in {a} and {b} ({named(shared)})")
    question = "Are recordings in more than one set?"
    rule = "Groups of the samples' metadata that two sets share."
    if lines:
        yield Verdict(question, "Yes", "bad", "; ".join(lines) + ".", rule)
    else:
        yield Verdict(question, "No", "good", "No two sets share a group.", rule)


def classes_of_both(sets: Sequence[DataSet]) -> Iterator[Verdict]:
    """Whether a class has samples in one set and none in another that has its label set."""
    lines = []
    labelled = 0
    for a, b in combinations(sets, 2):
        for label_set, sizes in (a.report.get("classes") or {}).items():
            others = (b.report.get("classes") or {}).get(label_set)
            if others is None:
                continue
            labelled += 1
            for one, own, other, theirs in ((a, sizes, b, others), (b, others, a, sizes)):
                if lost := [name for name, n in own.items() if n and not theirs.get(name)]:
                    lines.append(f"{label_set}: {named(lost)} in {one.name}, not in {other.name}")
    if not labelled:
        return
    question = "Has every set the same classes?"
    rule = "report.json: classes with samples in one set and none in another with the same label set."
    if lines:
        yield Verdict(question, "No", "warn", "; ".join(lines) + ".", rule)
    else:
        yield Verdict(
            question, "Yes", "good", "Each class has samples in all sets that have its label set.", rule
        )


def leaks_verdict(sets: Sequence[DataSet], found: Row | None) -> Iterator[Verdict]:
    if found is None:
        return
    question = "Are videos of one set in another?"
    searched = ", ".join(
        f"{n:,} of {one.size:,} of {one.name}"
        for one in sets
        if (n := found["searched"].get(one.name)) is not None
    )
    why = f"Compared: {searched}."
    rule = (
        "The rule of vidssl leaks: the same bytes, or what moves correlates by 0.88 or more and no other "
        "video fits better; where little moves, pictures are alike."
    )
    is_whole = all(found["searched"].get(one.name, 0) >= one.size for one in sets)
    if found["pairs"]:
        yield Verdict(question, f"Yes, {counted(found['pairs'], 'pair')}", "bad", why, rule)
    else:
        yield Verdict(question, "No" if is_whole else "None found", "good" if is_whole else "info", why, rule)
