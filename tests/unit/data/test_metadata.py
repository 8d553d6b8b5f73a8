"""vidssl/data/metadata.py: labels in other spellings, values that JSON cannot hold, claims of others."""

import json

import pytest

from vidssl.core.errors import UserError
from vidssl.data.metadata import MEASURED, packed_mark, parse_meta

NUMBER_KEYS = ("class_id", "cls", "target", "y", "category_id")
NAME_KEYS = ("class", "class_name", "label_name", "category")
SIZE = 1000  # bytes of the media file


def meta_of(**members: bytes | str) -> dict:
    encoded = {ext.replace("_", "."): d.encode() if isinstance(d, str) else d for ext, d in members.items()}
    meta = parse_meta("x.tar: k", encoded, SIZE)
    json.dumps(meta, allow_nan=False).encode()  # it can be stored
    return meta


@pytest.mark.parametrize(
    ("members", "label", "name"),
    [
        ({"cls": "3"}, 3, None),
        ({"cls": "\ufeff 3\r\n"}, 3, None),
        ({"cls": "3".encode("utf-16")}, 3, None),
        ({"cls": "3.0"}, 3, None),
        ({"cls": "3\0\0"}, 3, None),
        ({"cls": "dog\n"}, None, "dog"),
        ({"cls": '"dog"'}, None, "dog"),
        ({"cls": '{"label": 3}'}, 3, None),
        ({"cls": "[3]"}, 3, None),
        ({"label": "dog"}, None, "dog"),
        ({"label_txt": "3"}, 3, None),
        ({"json": '{"caption": "x"}', "cls": "1"}, 1, None),
        ({"json": '{"label": null}', "cls": "1"}, 1, None),
        ({"json": '{"label": 3}', "cls": "dog"}, 3, "dog"),
        ({"json": '{"label": "dog"}', "cls": "3"}, 3, "dog"),
        ({"json": '{"label": 3}', "cls": "3"}, 3, None),
        ({"json": '{"label": "dog"}'}, None, "dog"),
        ({"json": '{"label": 1.0}'}, 1, None),
        ({"json": '{"label": "1"}'}, 1, None),
        ({"json": '{"label": "1.0"}'}, 1, None),
        ({"json": '{"label": [2]}'}, 2, None),
        ({"json": '{"label": {"id": 2, "name": "dog"}}'}, 2, "dog"),
        ({"json": '{"label": true}'}, None, "true"),
        ({"json": '\ufeff{"label": 1}'}, 1, None),
        ({"json": '{"label": 1}'.encode("utf-16")}, 1, None),
        ({"json": '{"Label": 1, "Class-Name": "dog"}'}, 1, "dog"),
        *(({"json": json.dumps({key: 4})}, 4, None) for key in NUMBER_KEYS),
        *(({"json": json.dumps({key: "a"})}, None, "a") for key in NAME_KEYS),
        ({"json": '{"label": 1, "target": 7, "category": "animal"}'}, 1, None),
        ({"json": "3"}, 3, None),
        ({"json": '"dog"'}, None, "dog"),
        ({"json": '["dog"]'}, None, "dog"),
        ({"meta_json": '{"label": 3}'}, 3, None),
    ],
)  # fmt: skip
def test_labels_in_many_spellings(members, label, name):
    meta = meta_of(**members)
    assert (meta.get("label"), meta.get("class")) == (label, name)


@pytest.mark.parametrize(
    "members",
    [
        *({"cls": text} for text in ("-1", "", " \n", "-1.0", "null", "nan", "\ufeff")),
        *({"json": json.dumps({"label": value})} for value in (-1, -1.0, None, "", "-1", float("nan"))),
        {"txt": "a dog runs"},
        {"txt": "3"},
        {"json": '{"caption": "a dog", "text": "3"}'},
        {"json": '{"label": [1, 2]}'},
        {"json": '{"label": 0.5}'},
        {"json": json.dumps({"label": "a caption " * 50})},
        {"json": "{}"},
        {"json": ""},
        {"json": "[1, 2]"},
        {},
    ],
)
def test_unlabelled(members):
    assert not {"label", "class"} & set(meta_of(**members))


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"cls": "20000000"}, r"k\.cls: 20000000 is no number of a class"),
        ({"cls": "-2"}, r"k\.cls: -2 is no number of a class"),
        ({"json": '{"label": 1e300}'}, r'k\.json: "label": 1000.* is no number of a class'),
        ({"json": '{"label": Infinity}'}, r'"label": .*is no number of a class'),
        ({"json": '{"label": %s}' % ("9" * 5000)}, r'"label": 9{40} is no number of a class'),
        ({"json": '{"label": {"id": -9}}'}, r"-9 is no number"),
        ({"json": '{"label": 1, "label": 2}'}, r'k\.json: .*"label" occurs twice, with 1 and 2'),
        ({"json": '{"label": 1}', "cls": "2"}, r"k\.cls: the label is 2, but 1 in another file of"),
        ({"json": '{"label": "a"}', "cls": "b"}, r"k\.cls: the label is 'b', but 'a'"),
        ({"json": "{"}, r"k\.json: not JSON: "),
        ({"json": b"\xff\xff{}"}, r"k\.json: not JSON: "),
        ({"json": "[" * 200_000}, r"k\.json: not JSON that can be read: nested too deeply"),
        ({"json": b" " * (17 << 20) + b"1"}, r"k\.json: has \d+ bytes; metadata of up to"),
        ({"cls": b"\xe9t\xe9"}, r"k\.cls: not UTF-8 text"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_cannot_be_understood_is_said_in_a_line(members, says):
    with pytest.raises(UserError, match=says) as e:
        meta_of(**members)
    assert "\n" not in str(e.value) and len(str(e.value)) < 300


def test_values_that_strict_json_cannot_hold():
    deep = "[" * 300 + "]" * 300
    meta = meta_of(
        json='{"a": NaN, "b": [Infinity, 1], "c": 9223372036854775808, "d": "\\ud800", "\\ud800": 1, '
        f'"e": {"9" * 5000}, "f": {deep}, "a2": 1, "a2": 2}}'
    )
    assert meta["a"] is None and meta["b"] == [None, 1] and meta["c"] == "9223372036854775808"
    assert meta["d"] == "\ufffd" and meta["\ufffd"] == 1 and meta["e"] == "9" * 5000 and meta["a2"] == 2


FOREIGN = {"frames": 20, "width": 1920, "height": 1080, "fps": 25.0, "times": [0.0], "decoder": "decord"}
FOREIGN |= {
    "decord": True,
    "rotation": 90,
    "duration": 1.0,
    "codec": "h264",
    "labels": ["a", "b"],
    "original": 1,
}


def test_facts_of_others_are_kept_but_not_believed():
    meta = meta_of(json=json.dumps({**FOREIGN, "label": 1, "group": 7, "url": "x"}))
    assert meta == {"claimed": FOREIGN, "label": 1, "group": "7", "url": "x"}
    assert not set(meta) & set(MEASURED)


@pytest.mark.parametrize(
    ("labels", "kept"),
    [({"tags": [0, 3], "label": 1}, True), ({"a": "dog"}, False), ({"a": 1e9}, False), ([1, 2], False)],
)
def test_numbers_of_several_label_sets_are_kept(labels, kept):
    assert meta_of(json=json.dumps({"label": 1, "labels": labels})).get("labels") == (
        labels if kept else None
    )


def test_facts_of_pack_are_believed_for_the_file_that_it_measured():
    ours = {"frames": 20, "label": -1, "class": None, "labels": {}, "packed": packed_mark(SIZE)}
    assert meta_of(json=json.dumps(ours)) == ours
    for other in (packed_mark(SIZE + 1), {**packed_mark(SIZE), "version": 99}, True, "pack"):
        assert "frames" not in meta_of(json=json.dumps({**ours, "packed": other}))
