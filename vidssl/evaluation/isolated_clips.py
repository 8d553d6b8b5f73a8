"""Clips of an evaluation decoded in a child process (`vidssl.data.isolation`)."""

from functools import partial

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vidssl.data.isolation import Failure, Reporter, Sandbox
from vidssl.evaluation.views import EvalClips

FAILURES_OF_A_PROCESS = ("hang", "crash", "memory")  # reasons that another attempt may not have


class IsolatedEvalClips(Dataset):
    """EvalClips decoded in a child process: a file that hangs or crashes the decoder counts as
    undecodable."""

    def __init__(self, clips: EvalClips, timeout_s: float, memory_bytes: int):
        """timeout_s: seconds to decode a sample; reading has timeouts of its own."""
        self.sandbox = Sandbox(
            partial(decode_in_child, clips),
            timeout_s,
            start_method="fork",
            timed_from="progress",
            memory_bytes=memory_bytes,
        )

    def __getitem__(self, number: int) -> tuple[int, Tensor | str]:
        clip = self.sandbox.run(number)
        return clip if not isinstance(clip, Failure) else (number, clip.reason)

    def close(self) -> None:
        """Kills the child."""
        self.sandbox.close()


def decode_in_child(clips: EvalClips, report: Reporter, number: int) -> tuple[int, Tensor | str]:
    """Returns the number, and the clip or the reason why there is none."""
    torch.set_num_threads(1)
    clips.on_decode = report.progress
    return clips[number]
