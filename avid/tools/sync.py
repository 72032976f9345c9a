"""In sync? The sound of a video is shifted: which shift does the network prefer? docs/method.md section 10.

In: a network, and a table of videos.
Out: how many videos prefer the right shift, exactly and within one step, as a flat dict; a picture of it.
"""

import numpy as np
import torch

from avid import config, data, evaluation, temporal_tasks

from .figures import plt, write

LONGEST_S = 2.0  # the largest shift, s
COARSEST_S, FINEST_S = 0.5, 0.05  # steps, s
COLOURS = {"similarity": "tab:blue", "order_cross": "tab:orange"}
LABELS = {"similarity": "cosine of picture and sound", "order_cross": "probability of “overlapping”"}


class Grid(data.Clips):
    """Pictures and sounds at the same moments, step_s apart, from the middle of each video: eval.clips +
    reach of both."""

    def __init__(self, table, cfg, step_s, reach):
        super().__init__(table, cfg, training=False, clips=cfg.eval.clips + reach)
        self.step_s = step_s

    def evenly(self, first_s, last_s):
        needs_s, has_s = self.length_s + (self.clips - 1) * self.step_s, last_s - first_s
        if has_s < needs_s:
            raise data.MediaError(
                f"too short to shift its sound: {has_s:.2f} of {needs_s:.2f} s; a lower eval.clips needs less"
            )
        start_s = first_s + (has_s - needs_s) / 2
        return [temporal_tasks.Clip(start_s + k * self.step_s) for k in range(self.clips)]


def steps(cfg, asked_s=None, longest_s=LONGEST_S):
    """(s between two shifts, how many of them there are on either side). Raises ConfigError.

    asked_s: None, half of the shorter of a picture's and a sound's clip, and at most COARSEST_S; longest_s:
    the largest shift.
    """
    usual_s = min(cfg.video.frames / cfg.video.fps / 2, cfg.audio.seconds / 2, COARSEST_S)
    step_s = usual_s if asked_s is None else asked_s
    if not FINEST_S <= step_s <= LONGEST_S:
        raise config.ConfigError(
            f"--step {step_s:g} cannot be used; expected {FINEST_S:g} to {LONGEST_S:g} s"
        )
    return step_s, int(longest_s / step_s + 1e-9)


def measure(subject, table, step_s=None, longest_s=LONGEST_S):
    """Which shift of the sound, by default −2 … 2 s, a network prefers, and how many videos prefer none, in
    percent.

    subject: evaluation.Subject; table: datasets.Table; step_s, longest_s: see `steps`. A shift of s pairs the
    picture at t with the sound at t + s; each shift gets the mean over eval.clips pairs of a video. Two ways
    to judge a pair: "similarity", the cosine of the embeddings, and, where the network has the head,
    "order_cross", the probability that picture and sound overlap.
    → {"similarity exact", "similarity within one step": of videos, percent; "similarity control exact", …: of
    pictures with the sounds of other videos, if there are any; "chance exact", …; and lists over "shifts_s":
    "similarity by shift", the mean over videos of what a shift gets more than the average one, "similarity
    error", its standard error, and "similarity preferred", percent of videos}. Raises ConfigError,
    MediaError.
    """
    step_s, reach = steps(subject.cfg, step_s, longest_s)
    found = evaluation.features(subject, Grid(table, subject.cfg, step_s, reach), "sync", step_s)
    shifts = np.arange(-reach, reach + 1)
    result = {"videos": len(found.index), "files": len(table), "skipped": len(found.failures)}
    result |= {"step_s": step_s, "shifts_s": (shifts * step_s).tolist()}
    others = np.roll(np.arange(len(found.index)), 1)  # the video whose sound is a video's control
    for way, judge in judges(subject, found).items():
        pairings = {way: np.arange(len(others))} | ({f"{way} control": others} if len(others) > 1 else {})
        for name, sounds in pairings.items():
            curve = by_shift(judge(sounds), reach)  # n×shifts
            preferred = shifts[curve.argmax(1)]
            result[f"{name} exact"] = 100 * np.mean(preferred == 0).item()
            result[f"{name} within one step"] = 100 * np.mean(abs(preferred) <= 1).item()
            curve -= curve.mean(1, keepdims=True)  # what a shift gets more than the others of the same video
            result[f"{name} by shift"] = curve.mean(0).tolist()
            result[f"{name} error"] = (curve.std(0) / len(curve) ** 0.5).tolist()
            result[f"{name} preferred"] = [100 * np.mean(preferred == shift).item() for shift in shifts]
    return result | {"chance exact": 100 / len(shifts), "chance within one step": 100 * 3 / len(shifts)}


def judges(subject, found):
    """{way: a function of n videos, whose sounds to take, → n×K×K float64 of picture i and sound j}."""
    video, audio = (found.embeddings[modality] for modality in data.MODALITIES)  # n×K×D
    ways = {"similarity": lambda sounds: np.einsum("nid,njd->nij", video, audio[sounds]).astype(float)}
    heads = subject.network.temporal.heads
    if "order_cross" in heads:
        ways["order_cross"] = lambda sounds: overlapping(heads["order_cross"], found, sounds, subject.device)
    return ways


@torch.inference_mode()
def overlapping(head, found, sounds, device):
    """The probability that picture i and sound j of each video overlap, by the head of order_cross: n×K×K
    float64."""
    rows, overlap = [], temporal_tasks.ORDERS.index("overlapping")
    for video, audio in zip(
        found.features["video"], found.features["audio"][sounds], strict=True
    ):  # K×F each
        K = len(video)
        pairs = np.concatenate([np.repeat(video, K, 0), np.tile(audio, (K, 1))], 1)  # K·K×2F
        logits = head(torch.from_numpy(pairs).to(device)).double()
        rows.append(logits.softmax(1)[:, overlap].view(K, K).cpu().numpy())
    return np.stack(rows)


def by_shift(scores, reach):
    """Scores of picture i with sound j, n×K×K → the mean over pairs of each shift j − i, −reach … reach:
    n×(2·reach + 1).

    K − reach pairs for each, those about the middle: no shift has more of them than another, or other places
    in the video.
    """
    curves = []
    for shift in range(-reach, reach + 1):
        i = (reach - abs(shift)) // 2 + max(0, -shift) + np.arange(scores.shape[1] - reach)
        curves.append(scores[:, i, i + shift].mean(1))
    return np.stack(curves, 1)


def rows(result):
    """`measure`'s result as rows of a table, one a way to judge, chance last."""
    ways = [name.removesuffix(" exact") for name in result if name.endswith(" exact")]
    for way in ways:
        exact, near = result[f"{way} exact"], result[f"{way} within one step"]
        yield {"preferred shift, % of videos": way, "none": exact, "within one step": near}


def draw(path, result):
    """What each shift gets, with its standard error over videos and the control in grey; and which shift is
    preferred."""
    ways = [way for way in COLOURS if f"{way} exact" in result]
    shifts, step = result["shifts_s"], result["step_s"]
    figure, axes = plt.subplots(1, len(ways) + 1, figsize=(9, 2.9), layout="constrained")
    for axis, way in zip(axes, ways, strict=False):
        for name, colour, label in (
            (way, COLOURS[way], "own sound"),
            (f"{way} control", "grey", "another video's"),
        ):
            if f"{name} exact" not in result:
                continue
            mean, error = np.array(result[f"{name} by shift"]), np.array(result[f"{name} error"])
            axis.plot(shifts, mean, "o-", color=colour, markersize=3, linewidth=1.3, label=label)
            axis.fill_between(shifts, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
        axis.set_title(f"{LABELS[way]},\nabove the mean of all shifts", fontsize=9)
        axis.legend(fontsize=7)
    width = 0.8 * step / len(ways)
    for n, way in enumerate(ways):
        offset = (n - (len(ways) - 1) / 2) * width
        near = result[f"{way} within one step"]
        label = f"{way}, {near:.0f} % within one step"
        axes[-1].bar(
            np.array(shifts) + offset, result[f"{way} preferred"], width, color=COLOURS[way], label=label
        )
    label = f"chance, {result['chance within one step']:.0f} % within one step"
    axes[-1].axhline(result["chance exact"], color="black", linestyle="--", linewidth=1, label=label)
    axes[-1].set_title("preferred shift,\n% of videos", fontsize=9)
    axes[-1].set_ylim(top=1.45 * max(axes[-1].get_ylim()[1], result["chance exact"]))  # room for the legend
    axes[-1].legend(fontsize=7, loc="upper center")
    for axis in axes:
        axis.set_xlabel("the sound is taken so much later, s", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    write(figure, path)
