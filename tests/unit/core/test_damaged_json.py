"""Files of our own that a power cut, or a person, has damaged: one line that says what to do."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

from data_prep.dedup import cached_near_duplicates
from vidssl.adaptation.request import check_request
from vidssl.core.errors import UserError
from vidssl.evaluation.comparison import read_probe
from vidssl.evaluation.embedding import open_embedding_folder
from vidssl.evaluation.embedding_files import read_embedding
from vidssl.evaluation.finished_rows import FinishedRows
from vidssl.evaluation.saved_heads import load_saved_head
from vidssl.pretrained.public import load_json
from vidssl.quickstart.results import add_times
from vidssl.zoo.measure import read_plan
from vidssl.zoo.results import flops_by_step

READERS = {
    "plan.json": lambda out: open_embedding_folder(out, {}),
    "embedding.json": read_embedding,
    "probe.json": lambda out: read_probe(out / "probe.json", "a"),
    "finished.jsonl": lambda out: FinishedRows(out, "abc"),
    "adapt.json": lambda out: check_request(Namespace(folder=out, out=str(out))),
    "plan.json of a zoo": lambda out: read_plan(Namespace(folder=out)),
    "probe.json with heads": load_saved_head,
    "times.json": lambda out: add_times(out / "times.json", {}),
    "config.json": lambda out: load_json(out / "config.json"),
    "log.jsonl": lambda out: flops_by_step(out / "log.jsonl"),
    "near.jsonl": lambda out: cached_near_duplicates(out / "near.jsonl", out, [], dict),
}
DAMAGED = {
    "empty": b"\n",
    "nul": b"\0" * 40 + b"\n",
    "half": b'{"a": [1,\n',
    "list": b"[1, 2]\n",
    "number": b"3\n",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
@pytest.mark.parametrize("name", READERS)
def test_a_damaged_file_is_named(name, content, tmp_path):
    file = tmp_path / name.split()[0]
    file.write_bytes(content)
    (tmp_path / "predictions.csv").touch()
    with pytest.raises(UserError, match=Path(file).name.replace(".", r"\.")) as error:
        READERS[name](tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rows", [b"key,start,end\na,x,1\n", b"a,b,c\n1,2,3\n", b"key,start,end\na\n"])
def test_damaged_rows_of_an_embedding(rows, tmp_path):
    (tmp_path / "embedding.json").write_text('{"format": "npy", "shape": [1, 2], "dtype": "float16"}')
    (tmp_path / "rows.csv").write_bytes(rows)
    np.save(tmp_path / "features.npy", np.zeros((1, 2), np.float16))
    with pytest.raises(UserError, match=r"rows\.csv: damaged"):
        read_embedding(tmp_path)


def test_features_that_are_empty(tmp_path):
    (tmp_path / "embedding.json").write_text('{"format": "npy", "shape": [1, 2], "dtype": "float16"}')
    (tmp_path / "rows.csv").write_text("key,start,end\na,0,1\n")
    (tmp_path / "features.npy").touch()
    with pytest.raises(UserError, match="damaged"):
        read_embedding(tmp_path)
