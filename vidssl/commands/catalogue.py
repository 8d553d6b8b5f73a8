"""What the project has, by name: methods, models, parts, data, probes, sources and recipes; without torch."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from vidssl.config import SHIPPED
from vidssl.config.key_tree import documentation, first_sentence
from vidssl.config.signatures import PartTable
from vidssl.data.schema import AUGMENT_PARTS
from vidssl.evaluation.dense.schema import TASKS
from vidssl.evaluation.probe_config import PROTOCOLS
from vidssl.model.schema import MODEL_PARTS
from vidssl.objective import schema, view_schema
from vidssl.pretrained.sources import FORMATS

PACK_SOURCES = PartTable("data_prep.sources", "SOURCES")


class Listed(NamedTuple):
    """A name with what it stands for. papers: numbers at arXiv."""

    name: str
    about: str
    papers: list[str]


class Catalogue(NamedTuple):
    """use: how its names are used."""

    entries: Callable[[], Iterator[Listed]]
    use: str


def listed(name: str, text: str, papers: list[str] | None = None) -> Listed:
    """The first sentence of a text, without the numbers of papers, which stand apart."""
    about = re.sub(r" ?\(arXiv [\d.]+\)|(,| in)? arXiv [\d.]+(?=[,;:)])", "", first_sentence(text))
    return Listed(name, about, papers_of(text) if papers is None else papers)


def files_in(*folders: str) -> Callable[[], Iterator[Listed]]:
    """The YAML files of folders of configs/, by their headers; of several folders with the folder's name."""

    def entries() -> Iterator[Listed]:
        for folder in folders:
            for path in sorted((SHIPPED / folder).glob("*.yaml")):
                name = path.stem if len(folders) == 1 else f"{folder}/{path.stem}"
                header = header_of(path)
                yield listed(name, header, papers_of(header[: _end_of_title(header)]))

    return entries


def header_of(path: Path) -> str:
    """The comment at the top of a file, as one paragraph."""
    lines = path.read_text("utf-8").splitlines()
    first = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return " ".join(line.lstrip("# ") for line in lines[:first])


def _end_of_title(header: str) -> int:
    """Where the sentence ends that names a file's paper."""
    return len(":".join(header.split(":")[:2]))


def papers_of(text: str) -> list[str]:
    """The numbers at arXiv in a text."""
    return list(dict.fromkeys(re.findall(r"\b\d{4}\.\d{4,5}\b", text)))


def parts_in(table: PartTable) -> Callable[[], Iterator[Listed]]:
    """The kinds of a part, by their docstrings."""

    def entries() -> Iterator[Listed]:
        for kind in table:
            yield listed(kind, documentation(table[kind]))

    return entries


def models() -> Iterator[Listed]:
    """Our sizes of the ViT, then the files."""
    for kind in MODEL_PARTS:
        given = MODEL_PARTS[kind].given()
        about = "a ViT of any size: model.dim, model.depth, model.heads"
        if given:
            about = f"{given['dim']} wide, {given['depth']} blocks, {given['heads']} heads"
        yield Listed(kind, about, [])
    for entry in files_in("model")():
        yield entry._replace(name=f"configs/model/{entry.name}.yaml")


def sources() -> Iterator[Listed]:
    """What encoder= and run.init= read, and what pack --source reads."""
    for name, about in FORMATS.items():
        yield Listed(name, about, [])
    for kind in PACK_SOURCES:
        # each has a module of its own
        text = PACK_SOURCES[kind].module_docstring()
        yield listed(f"pack --source {kind}", text)


def _file(folder: str) -> str:
    return f"configs/{folder}/NAME.yaml among the arguments"


CATALOGUES = {
    "methods": Catalogue(files_in("method"), f"vidssl train {_file('method')}"),
    "models": Catalogue(models, "vidssl train ... model.kind=NAME, or the file among the arguments"),
    "masks": Catalogue(parts_in(schema.MASK_PARTS), "method.mask.kind=NAME"),
    "targets": Catalogue(parts_in(schema.TARGET_PARTS), "method.target.kind=NAME"),
    "queries": Catalogue(parts_in(schema.QUERY_PARTS), "method.query.kind=NAME"),
    "predictors": Catalogue(parts_in(schema.PREDICTOR_PARTS), "method.predictor.kind=NAME"),
    "errors": Catalogue(parts_in(schema.ERROR_PARTS), "method.error.kind=NAME"),
    "scores": Catalogue(parts_in(schema.SCORE_PARTS), "method.score.kind=NAME"),
    "corruptions": Catalogue(parts_in(schema.CORRUPTION_PARTS), "method.corrupt.kind=NAME"),
    "losses": Catalogue(parts_in(schema.AUX_PARTS), "method.aux=[{kind: NAME, weight: ...}]"),
    "agreements": Catalogue(parts_in(view_schema.PAIR_PARTS), "method.agree.agreement.kind=NAME"),
    "pretexts": Catalogue(parts_in(schema.PRETEXT_PARTS), "method.pretext.kind=NAME"),
    "augmentations": Catalogue(parts_in(AUGMENT_PARTS), "augment.kind=NAME"),
    "data": Catalogue(files_in("data"), f"vidssl train {_file('data')}"),
    "probes": Catalogue(files_in("probe"), f"vidssl probe {_file('probe')}"),
    "protocols": Catalogue(parts_in(PROTOCOLS), "vidssl probe ... probe.kind=NAME"),
    "tasks": Catalogue(parts_in(TASKS), "vidssl dense ... task.kind=NAME"),
    "sources": Catalogue(sources, "encoder=..., run.init=...; vidssl pack FOLDER OUT --source NAME"),
    "recipes": Catalogue(
        files_in("recipe", "run", "finetune", "dense", "zoo", "ablation"),
        "configs/NAME.yaml among the arguments",
    ),
}
