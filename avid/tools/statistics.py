"""The mean and the deviation of each band of a data set's spectrograms, for audio.statistics.

    python -m avid statistics --cfg avid --root /data/kinetics400 --out kinetics400.npz
    python -m avid statistics --data esc50 --root /data/esc50 --split train2 --out esc50.npz audio.mels=128
    torchrun --nproc-per-node 8 train.py --cfg avid --root /data/kinetics400 audio.statistics=kinetics400.npz

Every file is heard in eval.clips clips of audio.seconds, from its beginning to its end, decoded by
data.workers processes. The same command goes on after an interruption, to the same numbers. Train with the
settings audio.* that they were computed with.
"""

import dataclasses
import hashlib
import json
import os
import time
from pathlib import Path

from avid import cli, config, datasets
from avid.files import ConfigError, check_folder, replacing

LEAST_DB = 1.0  # deviation of a band that hardly varies, so that dividing by it blows up nothing [C]
BATCH = 16  # files at a time
SAVE_S = 30.0  # between two notes of what is done


def command_line(argv=None):
    arguments = cli.CommandLine(
        prog="python -m avid statistics", description=__doc__, formatter_class=cli.Help
    )
    arguments.add_argument("--cfg", default="toy", metavar="FILE", help="configuration (default: toy)")
    arguments.add_argument("--data", metavar="NAME", help="the same as data.name=NAME")
    arguments.add_argument("--root", metavar="DIR", help="the same as data.root=DIR")
    arguments.add_argument("--split", metavar="S", help="part to hear (default: what training reads)")
    arguments.add_argument("--out", required=True, metavar="FILE.npz", help="file to write")
    arguments.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    arguments = arguments.parse_args(argv)
    try:
        arguments.cfg = config.load(arguments.cfg, cli.overrides(arguments))
        arguments.out = Path(arguments.out)
        if arguments.out.suffix != ".npz":
            raise ConfigError(f"--out {arguments.out} needs the ending .npz")
        if arguments.out.exists():
            raise ConfigError(
                f"{arguments.out} exists, and is not overwritten; delete it, or name another file"
            )
        check_folder(arguments.out.parent)
    except ConfigError as error:
        config.stop(error)
    return arguments


def measure(table, cfg, out):
    """Hear all files of a table and write `out`, .npz: mean and std (bands, dB), count (columns heard),
    settings.

    table: datasets.Table; cfg: config.Config, of which data.workers, eval.clips and audio.* count. What is
    done stands in <out>.unfinished until the end. Raises ConfigError where that is of other files or
    settings, MediaError where too many files cannot be used.
    """
    import numpy as np  # here: --help and a wrong argument answer without the heavy imports
    import torch

    from avid import data, progress

    bands, part = config.bands(cfg.audio), out.with_name(out.name + ".unfinished")
    heard = dataclasses.replace(
        cfg.audio, statistics=" ".join(["0/1"] * bands)
    )  # dB are read, nothing is normalised
    cfg = dataclasses.replace(cfg, audio=heard)
    asked = [
        str(table.root.resolve()),
        table.paths,
        table.start_s.tolist(),
        table.end_s.tolist(),
        cfg.eval.clips,
        dataclasses.asdict(heard),
    ]
    mark = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    done, count, sums = 0, 0, np.zeros((2, bands))  # of dB, and of their squares
    if part.exists():
        try:
            with np.load(part, allow_pickle=False) as saved:
                before, done, count, sums = (
                    str(saved["mark"]),
                    int(saved["done"]),
                    int(saved["count"]),
                    saved["sums"],
                )
        except Exception as error:  # a damaged file can fail in any way
            raise ConfigError(
                f"{part} cannot be read ({type(error).__name__}); delete it to begin anew"
            ) from None
        if before != mark:
            raise ConfigError(f"{part} is of other files or settings; delete it, or name another --out")

    def save():
        with replacing(part, "wb") as file:
            np.savez(file, mark=np.array(mark), done=done, count=count, sums=sums)

    print(table.report())
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, decode="cpu"))  # no device takes part
    clips = data.Clips(datasets.take(table, slice(done, None)), cfg, training=False, modalities=("audio",))
    bad_files = data.BadFiles(clips.table, cfg.data.max_bad_share)
    bar = progress.bar(None, "hearing", len(table), done, unit="file")
    saved_at = time.monotonic()
    try:
        for batch in data.loader(clips, cfg.data.workers, batch_size=BATCH) if len(clips) else ():
            bad_files.count(batch["failures"], len(batch.get("index", ())))
            if "audio" in batch:
                level = batch["audio"].flatten(0, 3).double()  # columns × bands, dB
                count += len(level)
                sums = sums + torch.stack([level.sum(0), level.square().sum(0)]).numpy()
            files = min(BATCH, len(table) - done)
            done += files
            bar.update(files)
            if time.monotonic() - saved_at > SAVE_S:
                save()
                saved_at = time.monotonic()
    finally:
        save()
        bar.close()
    if not count:
        raise data.MediaError(f"none of the {len(table):,} files of {table.name} can be used")
    mean = sums[0] / count
    std = np.sqrt(np.maximum(sums[1] / count - mean**2, LEAST_DB**2))
    with replacing(out, "wb") as file:
        np.savez(file, mean=mean.astype(np.float32), std=std.astype(np.float32), count=count)
    part.unlink()
    unread = f", {len(bad_files.reasons):,} files could not be used" if bad_files.reasons else ""
    levels = f"mean {mean.mean():.1f} dB, deviation {std.mean():.1f} dB"
    print(f"{bands} bands, {count:,} columns{unread}; {levels}: {out}")


def main(argv=None):
    arguments = command_line(argv[1:] if argv is not None else None)
    from avid import evaluation, toy

    cfg = arguments.cfg
    with evaluation.plain_errors():
        source = cfg.data
        if source.name == "toy":
            source = dataclasses.replace(
                source, root=str(toy.write(source.root, cfg.toy, cfg.seed, os.cpu_count()))
            )
        measure(datasets.load(source, source.split or "train"), cfg, arguments.out)
        print(f"now: python train.py … audio.statistics={arguments.out}")
