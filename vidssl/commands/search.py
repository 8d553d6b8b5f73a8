"""Nearest clips: which of the embedded videos look like a query.

vidssl search DIR QUERY [--top K] [--centre] [--montage OUT.png]

DIR: the output of vidssl embed. QUERY: a key in DIR (all its rows are asked for, and left out of the answer),
or a video or image, which the encoder of DIR sees as it saw the others. Prints similarity (cosine), start and
end in seconds, and key of each hit. --centre subtracts the mean of DIR first: it tells clips apart where all
of them are alike. --montage draws four frames of the query and of each hit.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_writable
from vidssl.evaluation.embedding_files import StoredRows, read_embedding
from vidssl.evaluation.search import Hit, nearest, pooled


def search_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vidssl search", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("dir", type=Path, metavar="DIR")
    add("query", metavar="QUERY")
    add("--top", type=int, default=10, metavar="K", help="hits that are shown; default: 10")
    add("--centre", action="store_true", help="subtract the mean of all rows")
    add("--montage", type=Path, metavar="OUT.png")
    add("--json", action="store_true", help="print a JSON object a line instead")
    return parser


def main(argv: list[str]) -> None:
    a = search_parser().parse_args(argv)
    if a.top < 1:
        raise UserError(f"--top {a.top}: must be positive")
    if a.montage is not None:
        if a.montage.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise UserError(f"--montage {a.montage}: give a .png or .jpg")
        check_writable(a.montage.parent)
    stored = read_embedding(a.dir)
    is_key = a.query in set(stored.keys)
    query = rows_of_key(stored, a.query) if is_key else features_of_file(stored, a.dir, a.query)
    hits = nearest(stored, query, a.top, a.query if is_key else None, a.centre)
    for hit in hits:
        if a.json:
            print(json.dumps(hit._asdict()))
        else:
            print(f"{hit.similarity:7.4f}  {hit.start:8.2f} - {hit.end:8.2f} s  {hit.key}")
    if a.montage is not None:
        draw_hits(stored, a, hits, is_key)
        print(f"{a.montage}: the query and {len(hits)} hits")


def rows_of_key(stored: StoredRows, key: str) -> np.ndarray:
    """Rows f32 [q, D] of a sample."""
    return pooled(stored.features[[i for i, other in enumerate(stored.keys) if other == key]])


def features_of_file(stored: StoredRows, folder: Path, query: str) -> np.ndarray:
    """The features f32 [1, D] of a file, by the encoder of the embedding."""
    if not Path(query).is_file():
        keys = f"{stored.keys[0]}, ..." if stored.keys else "none"
        if of_shards := [key for key in dict.fromkeys(stored.keys) if key.endswith(f"/{query}")]:
            keys = ", ".join(of_shards[:4]) + (", ..." if len(of_shards) > 4 else "")
        raise UserError(f"{query}: no key of {folder} (keys: {keys}), and no such file")
    # Importing torch takes seconds: mistakes are answered before.
    from vidssl.evaluation.frozen_encoder import Output, load_frozen_encoder
    from vidssl.evaluation.report import encoder_facts, is_same_encoder

    facts = stored.facts
    view = facts["view"]
    source = facts["encoder"]["source"]
    path = Path(facts["root"]) / source
    encoder = load_frozen_encoder(
        path if path.exists() else source,
        file=facts["encoder"]["file"],
        frames=view["frames"],
        size=view["size"],
        precision=facts["precision"],
    )
    if not is_same_encoder(facts["encoder"], encoder_facts(encoder.net, encoder.metadata)):
        raise UserError(
            f"{source}: is another encoder now than that of {folder}: embed again, or ask for a key"
        )
    tokens: Output = "class" if facts["tokens"] == "class" else "pooled"
    options = {name: view[name] for name in ("segments", "crops", "stride", "fps")}
    return encoder.embed(query, tokens, **options)[None].numpy()


def draw_hits(stored: StoredRows, a: argparse.Namespace, hits: list[Hit], is_key: bool) -> None:
    """Draws the query and the hits."""
    from vidssl.pictures.montage import Strip, draw_montage, strips_of

    facts: dict[str, Any] = stored.facts
    rows = [(hit.key, hit.start, hit.end) for hit in hits]
    captions = [f"{hit.similarity:.3f}  {hit.start:.1f} - {hit.end:.1f} s  {hit.key}" for hit in hits]
    if is_key:
        spans = [(stored.start[i], stored.end[i]) for i, key in enumerate(stored.keys) if key == a.query]
        rows.insert(0, (a.query, min(s for s, _ in spans), max(e for _, e in spans)))
        strips = strips_of(facts, rows, [f"query  {a.query}", *captions])
    else:
        own = strips_of({"kind": "files", "root": ""}, [(a.query, 0.0, 0.0)], [f"query  {a.query}"])
        strips = [*own, *strips_of(facts, rows, captions)]
    assert all(isinstance(strip, Strip) for strip in strips)
    draw_montage(strips, a.montage)


if __name__ == "__main__":
    run_cli(main)
