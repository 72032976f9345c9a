"""Real clips, some of them with the sound of another clip: faulty positives whose ground truth is known.

In: a folder with clips and a manifest of them (path, label, split, perhaps start and end).
Out: a folder with the clips and a manifest with three more columns, which training never sees: faulty (1: the
sound is another clip's), original (the path of the unchanged clip) and part (the file's split in the folder's
manifest.csv). Pictures and sounds are copied packet by packet, without encoding.
"""

import contextlib
import csv
import dataclasses
import os
from pathlib import Path

import av
import numpy as np

import train
from avid import config, files

from . import measures, robust, runs

NAME = "manifest.csv"


def folder_of(root, source, share, seed):
    """The folder into which `write` puts the clips of the manifest `source` with this share swapped."""
    return Path(root) / f"{Path(source).parent.name}-{Path(source).stem}-{share:g}-swapped-seed{seed}"


def write(root, source, share, seed):
    """Swap the sounds of this share of a manifest's training clips, and return the path of the new manifest.
    Files that exist are not written again, so an interrupted call can be repeated."""
    source, folder = Path(source).absolute(), folder_of(root, source, share, seed)
    if (folder / NAME).exists():
        return folder / NAME
    rows = runs.read(source)
    if not rows:
        config.stop(f"no manifest with clips: {source}")
    paths = [row["path"] for row in rows]
    parts = {row["path"]: row["split"] for row in runs.read(source.parent / NAME)}
    train = [i for i, row in enumerate(rows) if row["split"] == "train"]
    sound_of = swaps(train, share, seed)
    folder.mkdir(parents=True, exist_ok=True)
    link(rows, source.parent, folder)
    for i, row in enumerate(rows):
        row |= {"faulty": str(int(i in sound_of)), "original": paths[i], "part": parts.get(paths[i], "")}
        if i in sound_of:
            of_sound = source.parent / paths[sound_of[i]]
            path = f"swapped/{i:05d}.mp4"
            if not (folder / path).exists():
                mux(source.parent / paths[i], of_sound, folder / path)
            row["path"] = path
    write_manifest(folder / NAME, rows)
    return folder / NAME


def link(rows, source, folder):
    """Link the clips of a manifest's rows, which lie in the folder `source`, into another folder."""
    for top in {row["path"].partition("/")[0] for row in rows}:
        if not (Path(folder) / top).exists():
            (Path(folder) / top).symlink_to(Path(source).absolute() / top)


def write_manifest(path, rows):
    """Write a manifest, whole or not at all. rows: dicts with the same columns."""
    with files.replacing(path, newline="") as file:
        lines = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        lines.writeheader()
        lines.writerows(rows)


def swaps(instances, share, seed):
    """{instance: the instance whose sound it gets} for this share of the instances, drawn by the seed. The
    sounds are exchanged among the drawn instances; none keeps its own."""
    chosen = np.random.default_rng((seed, 7)).permutation(instances)[: round(share * len(instances))]
    return {} if len(chosen) < 2 else dict(zip(chosen.tolist(), np.roll(chosen, 1).tolist(), strict=True))


def measure(run, cfg, feature_quality):
    """Train, unless the method is `untrained`, and measure: the columns of a study with swapped sounds.

    feature_quality: evaluation.Subject → {column: number}. The accuracies of the temporal tasks and the
    statistics of the weights are added.
    """
    method, (table, _) = run.group["method"], measures.tables(cfg)
    if method == "untrained":
        return feature_quality(measures.subject(measures.untrained(cfg), cfg, trained=False))
    with robust.oracle_weights(table) if method.endswith("oracle") else contextlib.nullcontext():
        train.main(cfg)
    network, saved = measures.trained(cfg)
    result = feature_quality(measures.subject(network, cfg))
    if network.temporal.heads:
        result |= measures.task_accuracies(network, cfg)
    if cfg.weights.xid:
        result |= measures.weight_statistics(measures.bank_of(saved, cfg), table, cfg.loss)
    return result


def originals(table):
    """The table with the unchanged clips in place of the swapped ones."""
    return dataclasses.replace(table, paths=table.columns["original"])


def mux(picture, sound, path):
    """Write an MP4 with the video packets of one file and the audio packets of another, both from 0 s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part.mp4")  # two studies may write it at once
    with av.open(str(picture)) as seen, av.open(str(sound)) as heard, av.open(str(part), "w") as out:
        packets = []
        for container, kind in ((seen, "video"), (heard, "audio")):
            stream = container.streams.best(kind)
            copy = out.add_stream_from_template(stream)
            for packet in container.demux(stream):
                if packet.dts is not None:
                    packet.stream = copy
                    packets.append(packet)
        for packet in sorted(packets, key=lambda packet: packet.dts * packet.time_base):
            out.mux(packet)
    os.replace(part, path)
