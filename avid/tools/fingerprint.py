"""Fingerprinting: does a distorted copy of a video find its original? docs/method.md section 10.

In: a network, and the table of videos that are both the gallery and, distorted, the queries.
Out: R@k of the copies by picture, by sound and by both, as one flat dict; a picture of R@1 against strength.
"""

import copy
import dataclasses

import numpy as np
import torch

from avid import config, data, datasets, evaluation, progress, temporal_tasks
from avid.spectrogram import spectrogram

from .distortions import DISTORTIONS, Distortion
from .figures import plt, write


def unchanged(clip, *_):
    return clip


SPEED = Distortion("both", (1.25, 1.5, 2.0), "times as fast, same pitch", unchanged)
PROTOCOL = {**DISTORTIONS, "speed": SPEED}  # whose clips cover more of the original: Copies.evenly
COLOURS = {"video": "tab:blue", "audio": "tab:orange", "joint": "black"}


class Copies(data.Clips):
    """One distorted copy of each of a table's videos: the pictures, or the sounds, of its evaluation clips.

    Random choices are a function of (seed, index): the same for all clips of a copy.
    """

    def __init__(self, table, cfg, modality, name, strength):
        """modality: video or audio; name, strength: of PROTOCOL."""
        super().__init__(table, cfg, training=False, modalities=(modality,))
        self.distort, self.strength = PROTOCOL[name].distort, strength
        self.speed = strength if name == "speed" else 1

    def evenly(self, first_s, last_s):
        """Of a copy that is played faster: a clip covers more of the original."""
        clips = temporal_tasks.evenly(first_s, last_s, self.speed * self.length_s, self.clips)
        return [dataclasses.replace(clip, speed=self.speed) for clip in clips]

    def for_device(self):
        return self  # distortions are of pictures and of sound, not of bytes

    def picture(self, media, clip, rng):
        return self.distort(super().picture(media, clip, rng), self.strength, copy.deepcopy(rng))

    def loudness(self, media, clip, rng):
        audio = self.cfg.audio

        def distort(wave):
            return self.distort(wave, audio.rate_hz, self.strength, copy.deepcopy(rng))

        return spectrogram(media, self.start_of(clip, audio.seconds), audio, clip.speed, distort)


def measure(subject, table, modalities, ks):
    """R@k, percent, of every distortion at every strength: {"crop 0.9 joint instance R@1": …}, by class where
    all have one.

    subject: evaluation.Subject; table: datasets.Table. The gallery is the n videos that can be read, the
    queries their copies. A distortion of one modality leaves the other as it is; joint features are both, of
    unit length each, one behind the other [C]. Besides: "chance instance R@1", …; videos and gallery_videos,
    n; files, of how many; skipped: videos that cannot be read; unread_copies: of a video, distortion and
    strength. Features of the copies are kept, so that an interrupted measurement goes on. Raises ConfigError,
    MediaError.
    """
    if "audio" in modalities:
        check(subject.cfg.audio)
    clean = evaluation.in_common(
        [evaluation.features_of(subject, table, modality) for modality in modalities]
    )
    n = len(clean.index)
    if not n:
        raise data.MediaError(f"no file of {table.name} has both a picture and a sound that can be used")
    gallery = {modality: clean.video_level("features", modality) for modality in modalities}  # n×F each
    originals = datasets.take(table, clean.index)
    matches = evaluation.matches_among(originals.labels)

    recalls, unread = {}, 0
    kinds = {name: kind for name, kind in PROTOCOL.items() if kind.modality in (*modalities, "both")}
    copies = [(name, strength) for name, kind in kinds.items() for strength in kind.strengths]
    for name, strength in progress.bar(copies, "fingerprinting", unit="distortion", leave=False):
        query = dict(gallery)
        for modality in modalities if name == "speed" else (kinds[name].modality,):
            query[modality] = copy_features(subject, originals, modality, name, strength)
        # the copies that could be read, by their position in the gallery
        read = np.flatnonzero(np.isfinite(np.hstack([*query.values()])).all(1))
        if not len(read):
            raise data.MediaError(f"none of the copies of {table.name} can be used: {name} {strength:g}")
        unread += n - len(read)
        query, key = with_joint(query), with_joint(gallery)
        for what in key:
            found = evaluation.nearest(query[what][read], key[what], max(ks))
            for by, match in matches.items():
                recall = evaluation.recall(found, lambda q, f, read=read, match=match: match(read[q], f), ks)
                recalls |= {f"{name} {strength:g} {what} {by} {k}": value for k, value in recall.items()}
    counts = {"videos": n, "gallery_videos": n, "files": len(table), "skipped": len(table) - n}
    chance = evaluation.chance_among(originals.labels, ks)
    return {**counts, "unread_copies": unread, **chance, **recalls}


def check(audio):
    """Raise ConfigError where a distortion cannot be made of such sounds (config.Audio)."""
    for kind in DISTORTIONS.values():
        for strength in kind.strengths if kind.modality == "audio" else ():
            try:
                kind.distort(torch.zeros(1000), audio.rate_hz, strength, np.random.default_rng(0))
            except ValueError as error:
                raise config.ConfigError(
                    f"fingerprinting cannot be done with audio.rate_hz={audio.rate_hz}: {error}"
                ) from None


def copy_features(subject, table, modality, name, strength):
    """Features of a table's copies, the mean over their clips, kept: n×F float32, unit rows; NaN where one
    cannot be read."""
    copies = Copies(table, subject.cfg, modality, name, strength)
    found = evaluation.features(subject, copies, name, strength, subject.cfg.seed, level="video")
    features = np.full((len(table), found.features[modality].shape[-1]), np.nan, np.float32)
    features[found.index] = found.features[modality][:, 0]
    return features


def with_joint(features):
    """{video n×F, audio n×F} and, where there are both, joint n×2F."""
    return {**features, "joint": np.hstack([*features.values()])} if len(features) > 1 else features


def rows(result):
    """R@1 of `measure`'s result as rows of a table, one a distortion and strength; chance comes first."""
    whats = [what for what in COLOURS if any(f" {what} instance" in key for key in result)]
    bys = [by for by in ("instance", "class") if f"chance {by} R@1" in result]
    chance = {f"{what} {by}": result[f"chance {by} R@1"] for what in whats for by in bys}
    yield {"R@1, %": "chance", "strength": "", **chance}
    for name, kind in PROTOCOL.items():
        for strength in kind.strengths:
            if f"{name} {strength:g} {whats[0]} instance R@1" in result:
                recalls = {key: result[f"{name} {strength:g} {key} R@1"] for key in chance}
                yield {"R@1, %": name, "strength": f"{strength:g}", **recalls}


def draw(path, result):
    """R@1 by instance against strength, a panel a distortion: the picture's above, the sound's below."""
    panels = {}
    for row in list(rows(result))[1:]:
        panels.setdefault(row["R@1, %"], []).append(row)
    lines = [[name for name in panels if PROTOCOL[name].modality == modality] for modality in data.MODALITIES]
    lines = [line for line in lines if line]
    lines[0].append("speed")
    size = {
        "figsize": (1.9 * len(lines[0]), 2.3 * len(lines) + 0.3),
        "layout": "constrained",
        "squeeze": False,
        "sharey": True,
    }
    figure, axes = plt.subplots(len(lines), len(lines[0]), **size)
    places = {
        name: axis
        for line, part in zip(lines, axes, strict=True)
        for name, axis in zip(line, part, strict=False)
    }
    for axis in set(axes.flat) - set(places.values()):
        axis.set_axis_off()
    for name, axis in places.items():
        for what, colour in COLOURS.items():
            values = [row[f"{what} instance"] for row in panels[name] if f"{what} instance" in row]
            as_it_was = what not in ("joint", PROTOCOL[name].modality) and name != "speed"
            if values:
                axis.plot(
                    values, ":" if as_it_was else "o-", color=colour, label=what, markersize=4, linewidth=1.3
                )
        axis.axhline(result["chance instance R@1"], color="grey", linestyle="--", linewidth=1, label="chance")
        axis.set_xticks(range(len(panels[name])), [row["strength"] for row in panels[name]], fontsize=8)
        axis.set(ylim=(-4, 104), xlim=(-0.3, len(panels[name]) - 0.7))
        axis.set_title(name.replace("_", "-"), fontsize=10)
        axis.set_xlabel(PROTOCOL[name].unit, fontsize=7)
        axis.grid(alpha=0.3)
    for line in axes:
        line[0].set_ylabel("R@1, %", fontsize=9)
    legend = {
        "title": "dotted: not distorted" if len(lines) > 1 else None,
        "title_fontsize": 8,
        "fontsize": 9,
        "ncols": 4,
    }
    figure.legend(handles=places["speed"].get_lines(), loc="outside upper center", **legend)
    write(figure, path)
