"""When each clip is taken, and what a network has to tell of it: docs/method.md section 6.

In: the usable part of a video and a generator; features of clips.
Out: clips, each an interval of the source with a speed and a direction; labels; logits and accuracies of the tasks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

ORDERS = ("before", "overlapping", "after")
UNKNOWN = -1  # a label that a video is too short to give: masked in the loss
TASKS = (
    "speed_video",
    "speed_audio",
    "direction_video",
    "direction_audio",
    "order_video",
    "order_audio",
    "order_cross",
)


@dataclass(frozen=True)
class Clip:
    """A clip that covers [start_s, start_s + speed · length] of the source, in seconds of the file's clock."""

    start_s: float
    speed: float = 1
    backward: bool = False


def plan(first_s, last_s, length_s, temporal, rng):
    """When the clips of one video are taken, and the labels of all tasks.

    first_s, last_s: the usable part; length_s: c, of a clip at speed 1; temporal: config.Temporal; rng: numpy Generator.
    → clips (1 or 2), {"speed": M classes, "direction": M of 0 (forward) or 1, "order": 0 before, 1 overlapping, 2 after}.

    Each of these is drawn uniformly and independently of the others, so that none tells another: a speed s where s·c fits; a
    direction; an order where the two clips fit one after the other, whatever order is drawn. What a video is too short for
    is UNKNOWN: the speed where only one fits; the direction where a clip does not fit, as its end is padded; the order.
    """
    room_s = last_s - first_s
    fits = [s for s in temporal.speeds if s * length_s <= room_s]
    speeds = [int(rng.choice(fits or temporal.speeds[:1])) for _ in range(temporal.moments)]
    lengths_s = [s * length_s for s in speeds]
    backward = [temporal.reverse and bool(rng.integers(2)) for _ in speeds]
    order = UNKNOWN
    if temporal.moments == 1 or sum(lengths_s) > room_s:
        starts_s = [first_s + rng.random() * max(room_s - length, 0.0) for length in lengths_s]
    else:
        order = int(rng.integers(3))
        starts_s = first_s + _starts(order, *lengths_s, room_s, rng)
    labels = {
        "speed": [temporal.speeds.index(s) if len(fits) > 1 else UNKNOWN for s in speeds],
        "direction": [int(b) if fits else UNKNOWN for b in backward],
        "order": order,
    }
    return [Clip(float(t), s, b) for t, s, b in zip(starts_s, speeds, backward, strict=True)], labels


def _starts(order, first, second, room, rng):
    """Starts of two intervals of these lengths in [0, room], the first before, overlapping or after the second.

    Apart: every such pair is equally likely. Overlapping: they share at least half of the shorter one [C].
    """
    if order != 1:
        early, late = np.sort(rng.uniform(0, room - first - second, 2))
        return np.array([early, late + first] if order == 0 else [late + second, early])
    a = rng.uniform(0, room - first)
    shared = min(first, second) / 2
    low, high = max(a + shared - second, 0.0), min(a + first - shared, room - second)
    return np.array([a, rng.uniform(low, high)])


def evenly(first_s, last_s, length_s, clips):
    """`clips` clips of `length_s` seconds from the beginning to the end of the video, evenly spaced [A]."""
    step = max(last_s - first_s - length_s, 0.0) / max(clips - 1, 1)
    if clips == 1:
        return [Clip(first_s + max(last_s - first_s - length_s, 0.0) / 2)]
    return [Clip(first_s + k * step) for k in range(clips)]


# ---------------------------------------------------------------------------------------------- what must be told


def classes(cfg):
    """{task: number of its classes} of the tasks whose weight is not zero."""
    number = {"speed": len(cfg.temporal.speeds), "direction": 2, "order": len(ORDERS)}
    return {task: number[task.partition("_")[0]] for task in TASKS if getattr(cfg.weights, task)}


class Heads(nn.Module):
    """One head a task on the features: linear for speed and direction, a small MLP on two clips' features for order [C]."""

    def __init__(self, dim, tasks):
        """dim: {"video": F_v, "audio": F_a}; tasks: {task: classes}."""
        super().__init__()
        self.heads = nn.ModuleDict()
        for task, number in tasks.items():
            kind, _, modality = task.partition("_")
            if kind == "order":
                inputs = sum(dim.values()) if modality == "cross" else 2 * dim[modality]
                hidden = max(dim.values())
                self.heads[task] = nn.Sequential(
                    nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, number)
                )
            else:
                self.heads[task] = nn.Linear(dim[modality], number)

    def forward(self, video, audio):  # B·M×F_v, B·M×F_a
        """→ {task: logits}: B·M×C of speed and direction, B×3 of order, 2B×3 of order_cross: (v, a'), then (v', a)."""
        features, logits = {"video": video, "audio": audio}, {}
        for task, head in self.heads.items():
            kind, _, modality = task.partition("_")
            if kind != "order":
                x = features[modality]
            elif modality == "cross":
                x = torch.cat(
                    [torch.cat([video[0::2], audio[1::2]], 1), torch.cat([video[1::2], audio[0::2]], 1)]
                )
            else:
                x = torch.cat([features[modality][0::2], features[modality][1::2]], 1)
            logits[task] = head(x)
        return logits


def targets(task, batch):
    """The labels of a task's logits, UNKNOWN where masked: speed and direction B×M, order B of a batch → B·M, B or 2B."""
    label = batch[task.partition("_")[0]]
    if (
        task == "order_cross"
    ):  # a video clip relative to the sound of the other moment: the second pair is the other way round
        return torch.cat([label, torch.where(label == UNKNOWN, label, 2 - label)])
    return label.flatten()


def task_loss(logits, target):
    """Sum of the cross entropies, number of right answers, number of labels that are known: three scalars."""
    known = (target != UNKNOWN).sum()
    return (
        F.cross_entropy(logits.float(), target, ignore_index=UNKNOWN, reduction="sum"),
        (logits.argmax(1) == target).sum(),
        known,
    )
