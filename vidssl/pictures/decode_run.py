"""The steps of `vidssl decode`: a frozen run, a decoder of its predictions, figures, pictures."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import vidssl
from vidssl.core.io import atomic_write, atomic_write_text, claim_folder
from vidssl.core.log import logger
from vidssl.pictures.clips import data_clip
from vidssl.pictures.decode import DecoderTraining, DecodeSettings
from vidssl.pictures.decoded import (
    FLOW_STEPS,
    Rendered,
    decoded_rows,
    decoder_verdict,
    figures,
    render_all,
    still_row,
)
from vidssl.pictures.panels import PanelRow, encode_still, play, write_panels
from vidssl.pictures.run_clips import HeldOutClip, RunClips
from vidssl.pictures.runs import TrainedRun, open_run
from vidssl.pictures.strips import item, short_name, strip
from vidssl.training.preemption import exit_on_sigterm

CLIPS_FILE = "decoded_clips.json"  # in DIR: the panels of the picture, for the page of vidssl report
MOST_ITEMS = 4  # clips in it
OTHERS_STEP = 1 << 41  # of the clips whose predictions are a baseline; no step of the training
SLOWER = 0.6  # than the video: the predicted frames are few


@exit_on_sigterm("SIGTERM: what is saved stays; the same command goes on")
def decode_run(
    folder: Path,
    out: Path,
    settings: DecodeSettings,
    train: Sequence[str] | None,
    data: Path | None,
    videos: Sequence[Path],
    clips: int,
    samples: int,
    shown: int,
) -> dict[str, Any]:
    """Trains the decoder, writes decoded.json, its pictures and decoded_clips.json. Returns the figures.

    train: shards in place of the run's; data, videos: whose clips are rendered, in place of held-out
    training data; clips, samples, shown: numbers of clips that are measured, of samples of each, and of clips
    in the picture.
    """
    run = open_run(folder)
    part = run.prediction
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    run.objective.to(device)
    source = RunClips(run.cfg, train)
    with claim_folder(out, "decode"):
        shown_clips, origin = find_clips(run, source, data, videos, clips)
        decoder, facts = DecoderTraining(run, source, settings, out).train()
        others = source.batch(OTHERS_STEP, len(shown_clips)).to(device)
        rendered = render_all(part, decoder, shown_clips, others, samples, settings.seed)
        groups = [clip.group for clip in shown_clips]
        report = {
            "run": str(folder),
            "step": run.step,
            "clips": {"from": origin, "number": len(shown_clips), "groups": len(set(groups))},
            "samples": samples,
            "flow_steps": FLOW_STEPS,
            "decoder": facts,
            **figures(rendered, groups, settings.seed),
            "clip_keys": [clip.name for clip in shown_clips],
            "versions": {"vidssl": vidssl.__version__, "torch": str(torch.__version__)},
        }
        text = json.dumps(report, indent=1, allow_nan=False)
        atomic_write_text(out / "decoded.json", text)
        write_pictures(out, rendered, shown_clips, shown)
    for line in decoder_verdict(report):
        logger.info(line)
    logger.info(f"{out}: decoded.webp, decoded.png, decoded_clips.json, decoded.json")
    return report


def find_clips(
    run: TrainedRun, source: RunClips, data: Path | None, videos: Sequence[Path], count: int
) -> tuple[list[HeldOutClip], str]:
    """Returns the clips to render, and where they are from."""
    if videos:
        read = [(path, data_clip(path, run.cfg)) for path in videos]
        found = [HeldOutClip(str(path), str(path), clip.tensor()[0], clip.fps) for path, clip in read]
        return found, "given videos"
    if data is not None:
        other = RunClips(run.cfg, [str(data)])
        return other.middles(other.spread(count), count), str(data)
    held = source.hold_out(count)
    return source.middles(held, count), "training data of the run, held out from the decoder alone"


def write_pictures(out: Path, rendered: Sequence[Rendered], clips: Sequence[HeldOutClip], shown: int) -> None:
    rows = decoded_rows(rendered, shown)
    write_panels(out / "decoded.webp", rows, SLOWER * clips[0].fps)
    items = clip_items(rows, clips, SLOWER * clips[0].fps)
    atomic_write(out / CLIPS_FILE, partial(Path.write_text, data=json.dumps({"items": items})))
    still = encode_still(play([still_row(row) for row in rows])[0])
    atomic_write(out / "decoded.png", partial(Path.write_bytes, data=still))


def clip_items(rows: Sequence[PanelRow], clips: Sequence[HeldOutClip], fps: float) -> list[dict[str, Any]]:
    """Players of a page: the panels of each clip, which play together."""
    return [
        item(
            short_name(Path(clip.name).stem),
            "",
            [strip(panel.name.replace("\n", " ").strip(), panel.frames) for panel in row.panels],
            fps=fps,
        )
        for row, clip in zip(rows[:MOST_ITEMS], clips, strict=False)
    ]
