"""Holding out whole groups of samples (the clips of one source video, say), balanced over the classes."""

import hashlib
import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

TOLERANCE = 0.02  # of all samples: a share further from what is asked is reported
AIM = 0.25  # of the tolerance: how near the search tries to come
MAX_PASSES = 8  # over all groups
MAX_REPAIRS = 64  # moves that only correct the share
MAX_ATTEMPTS = 24  # searches from other starts while the share is not near
CANDIDATES = 32  # groups that are compared for a class, at most
SWAP_GROUPS = 2000  # groups that are considered for exchanges, at most
MAX_EXHAUSTIVE = 12  # groups: of so many all divisions are compared
MAX_TABLE = 1 << 22  # divisions times classes, at most
MISSING_PENALTY = 4.0  # of a class without a held-out group, in units of a class's balance
ALL = 0  # number of the class to which every sample belongs


def shuffle_key(seed: int, name: str) -> bytes:
    """SHA-256 of "SEED NAME": sorting names by it is a shuffle that depends on the seed and the names
    alone."""
    return hashlib.sha256(f"{seed} {name}".encode()).digest()


class GroupSplit(NamedTuple):
    """Which samples are held out, and what the groups did not allow."""

    held_out: np.ndarray  # bool [n]
    note: str | None  # one line; None: all is as asked
    is_far: bool  # the share is not within TOLERANCE of what was asked


class _GroupCounts(NamedTuple):
    """Samples of each group and class. Classes have numbers from 1; ALL stands for all samples."""

    counts: dict[str, list[tuple[int, int]]]  # group -> (class, samples), ALL first
    classes: int  # without ALL
    samples: int


def _count_groups(groups: Sequence[str], classes: Sequence[Iterable[Hashable]]) -> _GroupCounts:
    """groups, classes: the group and the classes of each sample."""
    found: dict[str, dict[Hashable, int]] = {}
    sizes: dict[str, int] = defaultdict(int)
    for group, labels in zip(groups, classes, strict=True):
        counts = found.setdefault(group, {})
        sizes[group] += 1
        for label in set(labels):
            counts[label] = counts.get(label, 0) + 1
    names = sorted({label for counts in found.values() for label in counts}, key=str)
    number = {label: i for i, label in enumerate(names, ALL + 1)}
    numbered = {
        group: [(ALL, sizes[group]), *sorted((number[label], n) for label, n in counts.items())]
        for group, counts in found.items()
    }
    return _GroupCounts(numbered, len(names), len(groups))


class _Partition:
    """Groups in train and held out, with running totals for each class. Moving a group costs as many steps as
    it has classes.

    The imbalance is the sum over classes of (held-out samples - wanted)^2 / samples, plus a penalty for each
    class of which nothing is held out. All samples together are a class, too, with the weight of all others.
    """

    def __init__(self, found: _GroupCounts, fraction: float, seed: int, attempt: int = 0):
        """attempt: decides the order of the groups; even ones never hold out a group that alone exceeds the
        share."""
        self.fraction = fraction
        self.size_limit = math.inf if attempt % 2 else (fraction + TOLERANCE) * found.samples
        salt = str(attempt or "")
        self.names = sorted(found.counts, key=lambda group: shuffle_key(seed, salt + group))
        self.counts = [found.counts[name] for name in self.names]
        self.sizes = [counts[0][1] for counts in self.counts]
        self.members: list[list[int]] = [[] for _ in range(found.classes + 1)]  # groups of each class
        self.samples = [0] * len(self.members)
        for place, counts_of in enumerate(self.counts):
            for c, n in counts_of:
                self.members[c].append(place)
                self.samples[c] += n
        self.is_held_out = [False] * len(self.names)
        self.excess = [-fraction * n for n in self.samples]  # held-out samples less those wanted
        self.held_out_groups = [0] * len(self.members)
        self.weight = [1 / max(1, n) for n in self.samples]
        self.weight[ALL] *= max(1, found.classes)

    def may_hold_out(self, group: int) -> bool:
        """Whether another group of each of its classes stays in train."""
        if self.sizes[group] > self.size_limit:
            return False
        return all(len(self.members[c]) - self.held_out_groups[c] > 1 for c, _ in self.counts[group])

    def move(self, group: int) -> None:
        """Holds the group out, or returns it to train."""
        sign = -1 if self.is_held_out[group] else 1
        self.is_held_out[group] = sign > 0
        for c, n in self.counts[group]:
            self.excess[c] += sign * n
            self.held_out_groups[c] += sign

    def change(self, group: int) -> float:
        """By how much `move` would change the imbalance."""
        sign = -1 if self.is_held_out[group] else 1
        last = 0 if sign > 0 else 1
        change = 0.0
        for c, n in self.counts[group]:
            change += self.weight[c] * n * (2 * sign * self.excess[c] + n)
            if self.held_out_groups[c] == last:
                change -= sign * MISSING_PENALTY
        return change

    def is_near(self) -> bool:
        return bool(self.held_out_groups[ALL]) and self.distance() <= TOLERANCE

    def distance(self, added: int = 0) -> float:
        """Distance of the held-out share from what is asked, with so many samples more."""
        return abs(self.excess[ALL] + added) / self.samples[ALL]


def split_by_group(
    groups: Sequence[str], classes: Sequence[Iterable[Hashable]], fraction: float, seed: int
) -> GroupSplit:
    """Holds out whole groups: `fraction` of all samples and of each class, as near as the groups allow.

    groups: of each sample; classes: those of each sample (none, one or several). In this order: no class is
    wholly out of train; something is held out; the share of all samples is within TOLERANCE of `fraction`; no
    class is wholly missing from the held-out part; the shares of the classes are near `fraction`. Iterative
    stratification (Sechidis et al. 2011): the class with the fewest groups chooses first; then moves and
    exchanges of groups improve the balance. The result depends on names, classes and the seed, not on the
    order of the samples. The time is linear in the number of samples, but for sorting.
    """
    if not len(groups) or fraction <= 0:
        return GroupSplit(np.zeros(len(groups), bool), None, False)
    best = _best_partition(groups, classes, fraction, seed)
    selected = {name for name, out in zip(best.names, best.is_held_out, strict=True) if out}
    held_out = np.array([group in selected for group in groups])
    return GroupSplit(held_out, _note(best), not best.is_near())


def _best_partition(
    groups: Sequence[str], classes: Sequence[Iterable[Hashable]], fraction: float, seed: int
) -> _Partition:
    found = _count_groups(groups, classes)
    best = _Partition(found, fraction, seed)
    divisions = 1 << len(best.names)
    if len(best.names) <= MAX_EXHAUSTIVE and divisions * len(best.members) <= MAX_TABLE:
        _compare_all(best)
        return best
    _search(best)
    for attempt in range(1, MAX_ATTEMPTS if len(best.names) <= SWAP_GROUPS else 2):
        if best.is_near():
            break
        other = _Partition(found, fraction, seed, attempt)
        if attempt > 1:
            _fill_at_random(other)
        _search(other)
        best = min(best, other, key=lambda p: (not p.held_out_groups[ALL], p.distance()))
    if not best.is_near():
        _cover_classes(best, best.distance() + TOLERANCE)
    return best


def _compare_all(p: _Partition) -> None:
    """Moves the groups to the best of all divisions; keeps all in train if none is allowed."""
    table = np.zeros((len(p.names), len(p.members)))  # samples of each group and class
    for group, counts in enumerate(p.counts):
        for c, n in counts:
            table[group, c] = n
    divisions = np.arange(1 << len(p.names))[:, None] >> np.arange(len(p.names)) & 1  # 1: held out
    held_out = divisions @ table
    is_allowed = (held_out < np.array(p.samples)).all(1) & (held_out[:, ALL] > 0)
    if not is_allowed.any():
        return
    divisions = divisions[is_allowed]
    held_out = held_out[is_allowed]
    excess = held_out + np.array(p.excess)
    distance = np.abs(excess[:, ALL]) / p.samples[ALL]
    imbalance = (np.array(p.weight) * excess**2).sum(1)
    near = TOLERANCE if distance.min() <= TOLERANCE else distance.min() + TOLERANCE
    keys = (imbalance, (held_out == 0).sum(1), np.where(distance <= near, 0, distance))
    for group in np.flatnonzero(divisions[np.lexsort(keys)[0]]).tolist():
        p.move(group)


def _search(partition: _Partition) -> None:
    """Holds groups out by `_cover_classes`, and improves that by moves and exchanges."""
    _cover_classes(partition, AIM * TOLERANCE)
    _balance(partition)
    _correct_share(partition)
    _balance(partition)
    _exchange_for_balance(partition)


def _fill_at_random(p: _Partition) -> None:
    """Another start: groups in random order, while they fit."""
    for group in range(len(p.names)):
        if p.excess[ALL] + p.sizes[group] <= AIM * TOLERANCE * p.samples[ALL] and p.may_hold_out(group):
            p.move(group)


def _cover_classes(p: _Partition, limit: float) -> None:
    """Holds out a group of each class that has none there, of the classes with the fewest groups first, while
    the share is at most `limit` above what is asked."""
    for c in sorted(range(len(p.members)), key=lambda c: (len(p.members[c]), c)):
        if p.held_out_groups[c]:
            continue
        fitting = (
            group
            for group in p.members[c]
            if p.excess[ALL] + p.sizes[group] <= limit * p.samples[ALL] and p.may_hold_out(group)
        )
        candidates = [group for group, _ in zip(fitting, range(CANDIDATES), strict=False)]
        if candidates:
            p.move(min(candidates, key=lambda group: p.change(group) / p.sizes[group]))


def _balance(p: _Partition) -> None:
    """Moves groups while that lowers the imbalance and keeps the share: large ones first, those of about the
    same size in random order."""
    order = sorted(range(len(p.names)), key=lambda group: -p.sizes[group].bit_length())
    for _ in range(MAX_PASSES):
        has_moved = False
        for group in order:
            added = -p.sizes[group] if p.is_held_out[group] else p.sizes[group]
            keeps_share = p.distance(added) <= max(AIM * TOLERANCE, p.distance())
            if not keeps_share or p.change(group) >= -1e-9:
                continue
            if p.is_held_out[group] or p.may_hold_out(group):
                p.move(group)
                has_moved = True
        if not has_moved:
            return


def _correct_share(p: _Partition) -> None:
    """Moves and exchanges groups until the share is near or cannot come nearer."""
    for _ in range(MAX_REPAIRS):
        if p.held_out_groups[ALL] and p.distance() <= AIM * TOLERANCE:
            return
        if not any(_try_exchange(p, *pair) for pair in _exchanges(p)):
            return


def _exchanges(p: _Partition) -> list[tuple[int | None, int | None]]:
    """Pairs (group to return, group to hold out; None: none) that bring the share nearer, the nearest first.

    Of the groups in train those are considered whose sizes are nearest to what would be exact.
    """
    held_out = [group for group, out in enumerate(p.is_held_out) if out]
    train = sorted((group for group, out in enumerate(p.is_held_out) if not out), key=p.sizes.__getitem__)
    sizes = [p.sizes[group] for group in train]
    pairs: list[tuple[float, int | None, int | None]] = []
    for out in (None, *held_out[:SWAP_GROUPS]):
        freed = 0 if out is None else p.sizes[out]
        if out is not None and len(held_out) > 1:
            pairs.append((p.distance(-freed), out, None))
        place = bisect_left(sizes, freed - p.excess[ALL])
        for i in range(max(0, place - CANDIDATES // 2), min(len(train), place + CANDIDATES // 2)):
            pairs.append((p.distance(sizes[i] - freed), out, train[i]))
    nearer = [pair for pair in pairs if pair[0] < p.distance() or not held_out]
    return [(out, into) for _, out, into in sorted(nearer, key=lambda pair: pair[0])]


def _try_exchange(p: _Partition, out: int | None, into: int | None) -> bool:
    """Exchanges two groups unless a class would leave train."""
    if out is not None:
        p.move(out)
    if into is None or p.may_hold_out(into):
        if into is not None:
            p.move(into)
        return True
    if out is not None:
        p.move(out)
    return False


def _exchange_for_balance(p: _Partition) -> None:
    """Exchanges groups of about the same size while that lowers the imbalance and keeps the share."""
    if len(p.names) > SWAP_GROUPS:
        return
    for out in [group for group, is_out in enumerate(p.is_held_out) if is_out]:
        best = None
        best_change = -1e-9
        change = p.change(out)
        limit = max(AIM * TOLERANCE, p.distance())
        p.move(out)
        similar = sorted(
            (g for g, is_out in enumerate(p.is_held_out) if not is_out and g != out),
            key=lambda g: abs(p.sizes[g] - p.sizes[out]),
        )
        for group in similar[:CANDIDATES]:
            if p.distance(p.sizes[group]) <= limit and p.may_hold_out(group):
                total = change + p.change(group)
                if total < best_change:
                    best = group
                    best_change = total
        p.move(out if best is None else best)


def _note(p: _Partition) -> str | None:
    """What the groups did not allow, in one line."""
    parts = []
    if p.distance() > TOLERANCE:
        share = p.fraction + p.excess[ALL] / p.samples[ALL]
        largest = max(p.sizes) / p.samples[ALL]
        parts.append(
            f"{share:.3f} of the samples instead of {p.fraction:g} ({len(p.names)} groups, the largest "
            f"with {largest:.3f} of the samples; a group that alone has a class stays in train)"
        )
    classes = range(ALL + 1, len(p.members))
    single = sum(len(p.members[c]) == 1 for c in classes)
    missing = sum(not p.held_out_groups[c] for c in classes) - single
    if single:
        parts.append(f"{single} of {len(classes)} classes have a single group, which stays in train")
    if missing:
        parts.append(
            f"{missing} of {len(classes)} classes stay in train, too: the share has no room for their groups"
        )
    return "; ".join(parts) or None
