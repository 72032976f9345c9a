"""When each clip is taken.

In: the usable part of a video, and a generator.
Out: clips, each an interval of the source with a speed and a direction.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Clip:
    """A clip that covers [start_s, start_s + speed · length] of the source, in seconds of the file's clock."""

    start_s: float
    speed: int = 1
    backward: bool = False


def plan(first_s, last_s, length_s, rng):
    """One clip of `length_s` seconds anywhere between first_s and last_s; at first_s if the video is shorter."""
    return [Clip(first_s + rng.random() * max(last_s - first_s - length_s, 0.0))]


def evenly(first_s, last_s, length_s, clips):
    """`clips` clips of `length_s` seconds from the beginning to the end of the video, evenly spaced [A]."""
    step = max(last_s - first_s - length_s, 0.0) / max(clips - 1, 1)
    if clips == 1:
        return [Clip(first_s + max(last_s - first_s - length_s, 0.0) / 2)]
    return [Clip(first_s + k * step) for k in range(clips)]
