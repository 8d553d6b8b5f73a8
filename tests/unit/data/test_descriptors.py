"""Waiting batches hold one file descriptor for each of their streams, however many clips they have."""

import os
import resource

import pytest
import torch
from training_clips import make_clips, train_batches

from vidssl.data.dataset import DecodeFailure, Example, first_decodable
from vidssl.data.loader import collate_step

STREAM = 1 << 48


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def example(position: int, frames: int = 2) -> Example:
    video = torch.full((3, frames, 4, 4), position % 251, dtype=torch.uint8)
    return Example(position, f"key{position}", position % 5, video, [DecodeFailure("bad", "hang")])


@pytest.mark.parametrize("sizes", [[4], [3, 2], [1, 5, 2]], ids=str)
def test_a_step_holds_one_tensor_for_each_stream(sizes):
    examples = [example(s * STREAM + i, frames=s + 1) for s, n in enumerate(sizes) for i in range(n)]
    step = collate_step(examples, len(sizes))
    assert step.exhausted is None
    tensors = [value for batch in step.batches for value in batch if isinstance(value, torch.Tensor)]
    assert [t.shape[0] for t in tensors] == sizes and all(t.is_contiguous() for t in tensors)
    for s, collated in enumerate(step.batches):
        batch = collated.to_batch()
        expected = [e for e in examples if e.position // STREAM == s]
        assert batch.video.equal(torch.stack([e.video for e in expected]))
        assert batch.position.tolist() == [e.position for e in expected]
        assert batch.label.tolist() == [e.label for e in expected]
        assert batch.key == [e.key for e in expected] and len(batch.failures) == len(expected)


def test_a_step_with_an_exhausted_position_names_it():
    exhausted = first_decodable(7, lambda position, attempt: DecodeFailure("bad", "hang"))
    step = collate_step([example(6), exhausted], 1)
    assert step.batches == [] and step.exhausted.position == 7


@pytest.mark.parametrize("isolate", [False, True])
def test_many_waiting_batches_stay_under_a_low_limit(isolate, synthetic_shards):
    """With a descriptor for each of 32 clips, eight batches would take 256 of them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    clips = make_clips(synthetic_shards / "train")
    steps = train_batches(clips, 0, 8, 32, 0, 1, workers=2, isolate=isolate)
    resource.setrlimit(resource.RLIMIT_NOFILE, (open_files() + 60, hard))
    try:
        kept = list(steps)  # none is let go before the last has come
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [len(batch.key) for batch in kept] == [32] * 8
