"""The x264 options of every file that is encoded here: the same frames give the same bytes in every run.

On small pictures x264 does not repeat itself with B-frames or macroblock trees (of 3,800 videos of 48x48
pixels half differed from one run to the next), nor with several threads.

Clips for training are written once and decoded in every epoch, so their entropy coding is CAVLC: they are
about a tenth larger than with CABAC, and decode in 0.6 to 0.75 of the time.
"""


def x264_options(crf: int, preset: str, keyframe_every: int | None = None) -> dict[str, str]:
    """Returns options of libx264. crf: 1 (best) to 51.

    keyframe_every: of clips for training: frames from one key frame to the next, in closed groups, whatever
    the pictures show (None: x264 decides).
    """
    options = {"crf": str(crf), "preset": preset, "threads": "1", "bf": "0", "x264-params": "mbtree=0"}
    if keyframe_every is not None:
        every = str(keyframe_every)
        options |= {"g": every, "keyint_min": every, "sc_threshold": "0", "flags": "+cgop", "a53cc": "0"}
        options["x264-params"] += ":cabac=0"
    return options
