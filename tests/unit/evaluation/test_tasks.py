"""Labels of train and test are matched by the names of their classes."""

from typing import Any

import pytest

from vidssl.core.errors import UserError
from vidssl.data.format import Sample
from vidssl.evaluation.tasks import make_task


def samples(labels: list[Any]) -> list[Sample]:
    found = []
    for number, label in enumerate(labels):
        meta = {} if label is None else {"labels": {"x": label}}
        found.append(Sample(f"s{number}", "mp4", 0, 0, 0, meta))
    return found


@pytest.mark.parametrize(
    ("classes", "test_classes", "test_labels", "expected"),
    [
        (["a", "b", "c"], ["a", "b", "c"], [0, 1, 2], [0, 1, 2]),
        (["a", "b", "c"], ["a", "c"], [0, 1, None], [0, 2, None]),
        (["a", "b", "c"], ["c", "b", "a"], [0, 1, 2], [2, 1, 0]),
        (["a", "b", "c"], ["b"], [0, -1, 0], [1, None, 1]),
        # listed by test, but no sample has it
        (["a", "b"], ["a", "b", "z"], [0, 1], [0, 1]),
        (["a", "b", "c"], ["c", "a"], [[0, 1], [1], None], [[2, 0], [0], None]),
    ],
)
def test_classes_are_matched_by_name(classes, test_classes, test_labels, expected):
    several = any(isinstance(label, list) for label in test_labels)
    train = samples([[0], [1]] if several else [0, 1])
    task, _, found = make_task("x", classes, train, samples(test_labels), "class", test_classes)
    assert found == expected and task.names == classes
    assert task.kind == ("tags" if several else "class")


def test_tags_and_numbers_are_matched_by_what_they_mean():
    train = samples([0, 1])
    task, train_labels, found = make_task("x", ["a|b", "c"], train, samples([0, 1]), "tags", ["c|a", "b"])
    assert (task.names, train_labels, found) == (["a", "b", "c"], [[0, 1], [2]], [[2, 0], [1]])
    _, train_labels, found = make_task("x", ["1", "3"], train, samples([0, 1]), "number", ["2.5", "7"])
    assert (train_labels, found) == ([1.0, 3.0], [2.5, 7.0])


@pytest.mark.parametrize(
    ("kind", "classes", "test_classes", "test_labels", "words"),
    [
        ("class", ["a", "b"], ["a", "z"], [1, 0, 1], "'z' (2 samples); train has 'a', 'b'"),
        ("class", ["a", "b"], ["A", "B"], [0, 1], "'A' (1 samples), 'B' (1 samples)"),
        ("class", ["a", "b"], [*"pqrst"], [0, 1, 2, 3, 4], " and 2 more;"),
        ("class", ["a", "b"], ["a", "z"], [[0, 1]], "'z' (1 samples)"),
        ("tags", ["a|b"], ["a|z"], [0], "'z' (1 samples)"),
    ],
)
def test_a_class_that_train_lacks_is_named(kind, classes, test_classes, test_labels, words):
    several = any(isinstance(label, list) for label in test_labels)
    with pytest.raises(UserError) as e:
        make_task("x", classes, samples([[0] if several else 0]), samples(test_labels), kind, test_classes)
    assert "label 'x': test has classes that train does not" in str(e.value) and words in str(e.value)
    assert "\n" not in str(e.value)
