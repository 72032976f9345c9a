"""What a training sample costs over the bare decoding of its frames and its sound: per sample, in one process and one run.

    python benchmarks/loader.py [--cfg toy] [--samples 300] [key=value …]

Bare: decord opens the file and reads the sample's frames, PyAV opens it and decodes the sample's stretch of sound. Loader: the
same files and moments through data.Clips, with crop, resize, resampling and log-mel. The two take turns, file by file.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from avid import config, data, evaluation, temporal_tasks
from avid.media import av, decord  # imported there after torch


def bare(path, frames, start_s, seconds):
    """Decode frames (their numbers) and the sound of an interval, and do nothing with them."""
    decord.VideoReader(path, num_threads=1).get_batch(frames).asnumpy()
    with av.open(path) as file:
        stream = file.streams.audio[0]
        file.seek(int(max(start_s, 0) / stream.time_base), stream=stream)
        for frame in file.decode(stream):
            frame.to_ndarray()
            if frame.time > start_s + seconds:
                break


def main():
    parser = config.parser(__doc__)
    parser.add_argument("--samples", type=int, default=300, help="default: 300")
    arguments = parser.parse_args()
    cfg = config.load(arguments.cfg or "toy", arguments.overrides)
    torch.set_num_threads(1)
    table, _ = next(evaluation.tables(cfg))
    clips = data.Clips(table, cfg, training=True)
    spent = {"bare": [], "loader": []}
    for sample in range(arguments.samples + 20):
        index, draw = sample % len(table), (3, 0, sample)
        path = str(table.root / table.paths[index])
        # the moment that the loader will draw
        with data.Media(path) as media:
            rng = np.random.default_rng((cfg.seed, *draw))
            (clip, *_), _ = temporal_tasks.plan(*clips.usable(media), clips.length_s, cfg.temporal, rng)
            start_s = clips.start_of(clip, cfg.video.frames / cfg.video.fps)
            times = start_s + (np.arange(cfg.video.frames) + 0.5) * clip.speed / cfg.video.fps
            frames = (np.searchsorted(media.frame_starts, times, side="right") - 1).tolist()
        for name, work in (
            (
                "bare",
                lambda p=path, f=frames, c=clip: bare(p, f, clips.start_of(c, cfg.audio.seconds), cfg.audio.seconds * c.speed),
            ),
            ("loader", lambda i=index, d=draw: clips[i, d]),
        )[:: 1 if sample % 2 else -1]:
            before = time.perf_counter()
            work()
            if sample >= 20:  # after the warm-up
                spent[name].append(1e3 * (time.perf_counter() - before))
    ratio = np.median(np.array(spent["loader"]) / np.array(spent["bare"]))
    for name, ms in spent.items():
        print(f"{name:7s} {np.median(ms):6.2f} ms a sample (median of {len(ms)})")
    print(f"ratio   {ratio:6.2f} (median of the samples' own)")


if __name__ == "__main__":
    main()
