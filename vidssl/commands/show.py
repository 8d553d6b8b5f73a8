"""Pictures of clips, masks, data sets and features: still (.png) or playing (.webp, .gif).

vidssl show masks --method NAME [--clip VIDEO] OUT  what a method hides and predicts
vidssl show clip VIDEO OUT                          frames as the loader decodes them, with their times
vidssl show augment CONFIG ... --clip VIDEO OUT     several draws of a clip and its augmentation
vidssl show shards DIR OUT                          playing clips of a packed data set, with labels
vidssl show features ENCODER VIDEO ... OUT          features as colours, and what is alike
vidssl show attention PROBE VIDEO ... OUT           where an attentive probe looks

`vidssl show PICTURE --help` lists its options.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from vidssl.commands import show_masks
from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_writable
from vidssl.pictures.formats import ANIMATED, STILL, check_picture_name
from vidssl.pretrained.sources import check_source


def picture_parser() -> argparse.ArgumentParser:
    lines = (__doc__ or "").split("\n")
    p = argparse.ArgumentParser(
        prog="vidssl show",
        description=lines[0],
        epilog="\n".join(lines[2:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = p.add_subparsers(dest="kind", required=True, metavar="PICTURE")
    # its arguments are those of show_masks.main
    kinds.add_parser("masks", help="what a method hides and predicts", add_help=False)

    def add(kind: str, about: str, arguments: str) -> argparse.ArgumentParser:
        one = kinds.add_parser(
            kind, help=about, description=about, usage=f"vidssl show {kind} {arguments} OUT"
        )
        # `out_first` has put it there
        one.add_argument("out", type=Path, metavar="OUT", help="a .png, .webp or .gif")
        return one

    clip = add("clip", "frames as the loader decodes them, with their times", "VIDEO")
    clip.add_argument("video", type=Path)
    augment = add("augment", "several draws of a clip and its augmentation", "CONFIG ... --clip VIDEO")
    augment.add_argument(
        "arguments", nargs="+", help="a run's folder, or files and key=value of a training", metavar="CONFIG"
    )
    augment.add_argument("--clip", type=Path, required=True, metavar="VIDEO")
    augment.add_argument("--draws", type=int, default=5)
    shards = add("shards", "playing clips of a packed data set, with labels", "DIR")
    shards.add_argument("folder", type=Path, metavar="DIR", help="a folder with an index.json")
    shards.add_argument("--clips", type=int, default=24, help="evenly spaced samples")
    features = add("features", "features as colours, and what is alike", "ENCODER VIDEO ... [options]")
    features.add_argument("encoder", help="a run, a file of ours, a public checkpoint, timm:NAME, hf:NAME")
    features.add_argument("videos", nargs="+", type=Path, metavar="VIDEO")
    add_view_options(features)
    features.add_argument(
        "--token", metavar="T,ROW,COLUMN", help="whose likes are shown; default: of the place that moves most"
    )
    attention = add("attention", "where an attentive probe looks", "PROBE VIDEO ... [options]")
    attention.add_argument("probe", type=Path, help="the out= of a probe")
    attention.add_argument("videos", nargs="+", type=Path, metavar="VIDEO")
    attention.add_argument("--label", help="label set; default: the first")
    attention.add_argument("--windows", type=int, default=4, help="clips of a video, at most")
    return p


def out_first(argv: list[str]) -> list[str]:
    """The arguments with the picture's name, which users write last, behind the kind of picture: argparse
    reads no single argument behind several of another."""
    kind, *rest = argv
    pictures = [i for i, text in enumerate(rest) if Path(text).suffix in (*STILL, *ANIMATED)]
    last = pictures[-1] if pictures else len(rest) - 1
    if last < 0 or rest[last].startswith("-"):
        return argv
    return [kind, rest[last], *rest[:last], *rest[last + 1 :]]


def add_view_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--windows", type=int, default=4, help="clips of a video, one after the other, at most")
    p.add_argument("--frames", type=int, help="of a clip; default: the encoder's own")
    p.add_argument("--size", type=int, help="pixels; default: the encoder's own")
    p.add_argument("--stride", type=int, help="between frames; default: as the encoder was trained")
    p.add_argument("--fps", type=float, help="frames a second, in place of --stride")


def check_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file")


def check_picture_arguments(a: argparse.Namespace) -> None:
    """Raises UserError for what can be known before torch is imported."""
    check_picture_name(a.out)
    check_writable(a.out.parent)
    for name in ("windows", "draws", "clips", "frames", "size", "stride", "fps"):
        if (value := getattr(a, name, None)) is not None and value <= 0:
            raise UserError(f"--{name} {value}: give a number above 0")
    for path in (
        *getattr(a, "videos", []),
        *filter(None, [getattr(a, name, None) for name in ("video", "clip")]),
    ):
        check_file(path)
    if a.kind == "features":
        check_source(a.encoder, "ENCODER", libraries=True)
        if a.stride and a.fps:
            raise UserError("give --stride or --fps, not both")
        a.token = parse_token(a.token)
    if a.kind == "attention" and not (a.probe / "probe.json").is_file():
        raise UserError(f"{a.probe}: has no probe.json; give the out= of a finished probe")
    if a.kind == "shards" and not (a.folder / "index.json").is_file():
        below = sorted(str(file.parent) for file in a.folder.glob("*/index.json"))
        hint = f"; data sets below it: {', '.join(below)}" if below else "; give a folder that pack wrote"
        raise UserError(f"{a.folder}: has no index.json{hint}")


def parse_token(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() for part in parts):
        raise UserError(f"--token {text}: give time slice, row and column from 0, such as 1,3,3")
    time_slice, row, column = (int(part) for part in parts)
    return time_slice, row, column


def main(argv: list[str]) -> None:
    if argv[:1] == ["masks"]:
        show_masks.main(argv[1:])
        return
    a = picture_parser().parse_args(out_first(argv) if argv else argv)
    check_picture_arguments(a)
    # Importing torch takes seconds: mistakes are answered before.
    from vidssl.pictures import show

    draw: dict[str, Any] = {
        "clip": show.show_clip,
        "augment": show.show_augment,
        "shards": show.show_shards,
        "features": show.show_features,
        "attention": show.show_attention,
    }
    given = {name: value for name, value in vars(a).items() if name != "kind"}
    draw[a.kind](**given)
    print(f"wrote {a.out}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
