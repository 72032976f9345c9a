"""When each clip is taken, and what a network has to tell of it: docs/method.md section 6.

In: the usable part of a video and a generator; features of clips.
Out: clips, each an interval of the source with a speed and a direction; their labels; logits of the tasks.
A task is one class here and one weight in config.py (docs/extending.md).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

ORDERS = ("before", "overlapping", "after")
UNKNOWN = -1  # a label that a video is too short to give: masked in the loss


@dataclass(frozen=True)
class Clip:
    """A clip covers [start_s, start_s + speed · length] of the source, in seconds of the file's clock."""

    start_s: float
    speed: float = 1
    backward: bool = False


@dataclass(frozen=True)
class Plan:
    """The clips of one video and what was drawn for them: all that a label can depend on."""

    clips: list[Clip]  # M
    fits: list[int]  # those of the speeds at which a clip fits into the video
    order: int  # a place in ORDERS; UNKNOWN where the two clips do not fit one after the other


# ------------------------------------------------------------------------------------ when clips are taken


def plan(first_s, last_s, length_s, temporal, rng):
    """When the clips of one video are taken, and the labels of all tasks.

    first_s, last_s: the usable part; length_s: c, of a clip at speed 1; temporal: config.Temporal; rng: numpy
    Generator. → M clips (1 or 2), {kind of task: label}.

    Speeds, directions and order are drawn uniformly and independently, so that none tells another: a speed s
    where s·c fits; a direction; an order where both clips fit one after the other, whatever order is drawn.
    What a video is too short for is UNKNOWN.
    """
    room_s = last_s - first_s
    fits = [s for s in temporal.speeds if s * length_s <= room_s]
    drawn_of = fits or temporal.speeds[:1]
    speeds = [drawn_of[rng.integers(len(drawn_of))] for _ in range(temporal.moments)]
    lengths_s = [s * length_s for s in speeds]
    backward = [temporal.reverse and bool(rng.integers(2)) for _ in speeds]
    order = UNKNOWN
    if temporal.moments == 1 or sum(lengths_s) > room_s:
        starts_s = [first_s + rng.random() * max(room_s - length, 0.0) for length in lengths_s]
    else:
        order = int(rng.integers(3))
        starts_s = first_s + _starts(order, *lengths_s, room_s, rng)
    clips = [Clip(float(t), s, b) for t, s, b in zip(starts_s, speeds, backward, strict=True)]
    drawn = Plan(clips, fits, order)
    return clips, {task.kind: task.label(drawn, temporal) for task in TASKS.values()}


def _starts(order, first, second, room, rng):
    """Starts of two intervals in [0, room]: the first is before, overlaps or is after the second.

    first, second: their lengths. Apart: every such pair is equally likely. Overlapping: they share at least
    half of the shorter one [C].
    """
    if order != 1:
        early, late = np.sort(rng.uniform(0, max(room - first - second, 0.0), 2))
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


# ------------------------------------------------------------------------------------------ what must be told


@dataclass(frozen=True)
class ClipTask:
    """A question about one clip, answered by a linear layer on its features."""

    modality: str  # video or audio

    kind = None  # tasks of one kind share a label; a task's name, and its weight's, is <kind>_<modality>

    def label(self, plan, temporal):
        """Plan, config.Temporal → what a batch carries as `kind`: M classes, UNKNOWN where masked."""
        raise NotImplementedError

    def classes(self, temporal):
        """The names of the classes, in the order of the labels."""
        raise NotImplementedError

    def head(self, dim, classes):
        """From `inputs` to logits. dim: {"video": F_v, "audio": F_a}; classes: their number."""
        return nn.Linear(dim[self.modality], classes)

    def inputs(self, features):
        """What the head sees, a row a question: {"video": B·M×F_v, "audio": B·M×F_a} → B·M×F."""
        return features[self.modality]

    def targets(self, batch):
        """The right answers, a row a question: of a batch's labels B×M → B·M."""
        return batch[self.kind].flatten()


class PairTask(ClipTask):
    """A question about a video's two clips, (v, v') or (a, a'), answered by a small MLP [C]: one label."""

    def head(self, dim, classes):
        return _mlp(2 * dim[self.modality], max(dim.values()), classes)

    def inputs(self, features):  # B·2×F → B×2F
        x = features[self.modality]
        return torch.cat([x[0::2], x[1::2]], 1)


class Speed(ClipTask):
    """How fast does the clip run? UNKNOWN where only one speed fits."""

    kind = "speed"

    def label(self, plan, temporal):
        return [temporal.speeds.index(c.speed) if len(plan.fits) > 1 else UNKNOWN for c in plan.clips]

    def classes(self, temporal):
        return [f"{speed}×" for speed in temporal.speeds]


class Direction(ClipTask):
    """Which way does the clip run? UNKNOWN where no clip fits: its end is padded, which would tell."""

    kind = "direction"

    def label(self, plan, temporal):
        return [int(clip.backward) if plan.fits else UNKNOWN for clip in plan.clips]

    def classes(self, temporal):
        return ["forward", "backward"]


class Order(PairTask):
    """Where does the first clip lie in the source, seen from the second? One label a video."""

    kind = "order"

    def label(self, plan, temporal):
        return plan.order

    def classes(self, temporal):
        return ORDERS


class OrderAcross(Order):
    """The same of a video clip and the sound of the other moment; of each video (v, a') and (v', a)."""

    def head(self, dim, classes):
        return _mlp(dim["video"] + dim["audio"], max(dim.values()), classes)

    def inputs(self, features):  # B·2×F_v, B·2×F_a → 2B×(F_v + F_a): all (v, a'), then all (v', a)
        video, audio = features["video"], features["audio"]
        return torch.cat([torch.cat([video[0::2], audio[1::2]], 1), torch.cat([video[1::2], audio[0::2]], 1)])

    def targets(self, batch):  # B → 2B: in the second pair the video clip is the other one
        order = super().targets(batch)
        return torch.cat([order, torch.where(order == UNKNOWN, order, 2 - order)])


def _mlp(inputs, hidden, classes):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))


TASKS = {  # by name; the heads are drawn from the random generator in this order
    f"{task.kind}_{task.modality}": task
    for task in (
        Speed("video"),
        Speed("audio"),
        Direction("video"),
        Direction("audio"),
        Order("video"),
        Order("audio"),
        OrderAcross("cross"),
    )
}


def classes(cfg):
    """{task: number of its classes} of the tasks whose weight is not zero."""
    weights = vars(cfg.weights)
    return {name: len(task.classes(cfg.temporal)) for name, task in TASKS.items() if weights[name]}


class Heads(nn.Module):
    """The head of each task."""

    def __init__(self, dim, tasks):
        """dim: {"video": F_v, "audio": F_a}; tasks: {task: number of classes}."""
        super().__init__()
        self.heads = nn.ModuleDict({name: TASKS[name].head(dim, n) for name, n in tasks.items()})

    def forward(self, video, audio):  # B·M×F_v, B·M×F_a
        """→ {task: logits}, a row a question."""
        features = {"video": video, "audio": audio}
        return {name: head(TASKS[name].inputs(features)) for name, head in self.heads.items()}


def targets(name, batch):
    """The right answers to a task, a row a question, of a batch's labels: UNKNOWN, too, where a file lacks
    what the task is about (`held` B×2, of video and audio)."""
    task = TASKS[name]
    if "held" not in batch:
        return task.targets(batch)
    held = {"video": batch["held"][:, 0], "audio": batch["held"][:, 1], "cross": batch["held"].all(1)}
    label = batch[task.kind]
    there = held[task.modality].view(-1, *[1] * (label.dim() - 1))  # B or B×1
    return task.targets({task.kind: label.where(there, UNKNOWN)})


def task_loss(logits, target):
    """Sum of the cross entropies, number of right answers, number of labels that are known: three scalars."""
    known = (target != UNKNOWN).sum()
    return (
        F.cross_entropy(logits.float(), target, ignore_index=UNKNOWN, reduction="sum"),
        (logits.argmax(1) == target).sum(),
        known,
    )
