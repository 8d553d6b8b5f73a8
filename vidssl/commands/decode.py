"""Decodes what a run predicts behind its masks to pixels, as V-JEPA's authors show.

vidssl decode RUN [--clip VIDEO ... | --data SHARDS] [--out DIR] [--minutes N]

Encoder and predictor stay frozen. A small decoder learns by flow matching, on the run's training data,
to draw the pixels behind a mask from the predictions for them, and from nothing else (--context: also from
the features of the visible tokens). Several samples of a clip show what the predictions say, and where the
samples differ, what they leave open. Clips are those of --data or --clip, else some of the training data
that the decoder does not see.

Writes DIR/decoded.webp (truth, what the encoder sees, samples, their mean and deviation, and the same
decoder given nothing), decoded.png, and decoded.json: errors behind the mask with 95 % intervals beside
those of the decoder given nothing, given the predictions for other clips, and of copying the last visible
frame. The same command goes on with a training that was cut off.
"""

import argparse
from pathlib import Path

from vidssl.core.errors import UserError, run_cli
from vidssl.core.io import check_no_shards, check_run_folder, check_writable
from vidssl.core.launch import check_one_process

MIN_SAMPLES = 2  # of which there is a deviation


def parse_decode(argv: list[str]) -> argparse.Namespace:
    lines = (__doc__ or "").split("\n")
    p = argparse.ArgumentParser(
        prog="vidssl decode",
        description=lines[0],
        epilog="\n".join(lines[4:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("run", type=Path, help="run.out of a training")
    p.add_argument("--clip", type=Path, nargs="+", default=[], metavar="VIDEO", help="clips to decode")
    p.add_argument("--data", type=Path, metavar="SHARDS", help="packed data of which clips are decoded")
    p.add_argument("--train", nargs="+", metavar="SHARDS", help="training data; default: the run's")
    p.add_argument("--out", type=Path, metavar="DIR", help="default: RUN/decoded")
    p.add_argument("--minutes", type=float, default=5.0, help="of training of the decoder (default: 5)")
    p.add_argument("--steps", type=int, help="of training, in place of --minutes")
    p.add_argument("--clips", type=int, default=32, help="measured clips, at most (default: 32)")
    p.add_argument("--samples", type=int, default=4, help="of each clip (default: 4)")
    p.add_argument("--shown", type=int, default=6, help="clips in the picture (default: 6)")
    p.add_argument("--context", action="store_true", help="the decoder sees the visible tokens' features")
    a = p.parse_args(argv)
    a.out = a.out or a.run / "decoded"
    return a


def check_decode(a: argparse.Namespace) -> None:
    """Raises UserError for what can be known before torch is imported."""
    check_run_folder(a.run)
    if a.clip and a.data:
        raise UserError("give --clip or --data, not both")
    for path in a.clip:
        if not path.is_file():
            raise UserError(f"--clip {path}: no such file")
    if a.data and not (a.data / "index.json").is_file():
        raise UserError(f"--data {a.data}: has no index.json; give a folder that pack wrote")
    for name, least in (("minutes", 0), ("steps", 1), ("clips", 1), ("samples", MIN_SAMPLES), ("shown", 1)):
        value = getattr(a, name)
        if value is not None and (value < least or value == 0):
            raise UserError(f"--{name} {value}: give {least or 'a number above 0'}{' or more' * bool(least)}")
    check_no_shards(a.out, "--out")
    check_writable(a.out)


def main(argv: list[str]) -> None:
    check_one_process(argv)
    a = parse_decode(argv)
    check_decode(a)
    # Importing torch takes seconds: mistakes are answered before.
    from vidssl.pictures.decode import DecodeSettings
    from vidssl.pictures.decode_run import decode_run

    settings = DecodeSettings(minutes=a.minutes, steps=a.steps, context=a.context)
    decode_run(a.run, a.out, settings, a.train, a.data, a.clip, a.clips, a.samples, a.shown)


if __name__ == "__main__":
    run_cli(main)
