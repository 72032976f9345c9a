"""What a training clip costs before and after `python -m avid.data prepare`, file by file.

    python benchmarks/prepare.py [FOLDER] [--clips 50]

A clip: the file is opened, 8 frames of a random half second and 2 s of sound are decoded, as training does.
One process, one thread.
"""

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def command_line():
    shared = Path(os.environ.get("AVID_TEST_DATA", ROOT.parent / "shared" / "data")) / "media"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "folder",
        nargs="?",
        type=Path,
        default=shared,
        help="files to prepare and read (default: %(default)s)",
    )
    parser.add_argument("--clips", type=int, default=50, help="clips a file (default: %(default)s)")
    return parser.parse_args()


if __name__ == "__main__":  # before the heavy imports: --help answers at once
    arguments = command_line()

import tempfile
import time

import numpy as np
import torch

from avid.media import Media, MediaError
from avid.tools.prepare import Small, prepare

FRAMES, FPS, SOUND_S, RATE_HZ = 8, 16, 2.0, 24000


def clip_ms(path, modalities, clips):
    """Milliseconds a clip (clips,): to open the file and decode a clip at a random time."""
    rng, times = np.random.default_rng(0), []
    for _ in range(clips):
        begin = time.perf_counter()
        media = Media(path, modalities)
        start_s = media.first_s + rng.random() * max(media.last_s - media.first_s - SOUND_S, 0.0)
        media.frames(start_s + np.arange(FRAMES) / FPS)
        if "audio" in modalities:
            media.sound(start_s, round(SOUND_S * RATE_HZ), RATE_HZ)
        media.close()
        times.append(1000 * (time.perf_counter() - begin))
    return np.array(times)


def main(arguments):
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        prepare(arguments.folder, folder, Small(), os.cpu_count())
        print(
            f"\n{'file':32s} {'kB':>7s} {'→':>7s}   {'ms a clip':>9s} {'→':>7s}   faster    (median of "
            f"{arguments.clips} clips)"
        )
        for after in sorted(Path(folder).rglob("*.mp4")):
            stem = after.relative_to(folder).with_suffix("")
            before = next(path for path in sorted((arguments.folder / stem.parent).glob(f"{stem.name}.*")))
            modalities = ("video", "audio")
            try:
                Media(after).close()
            except MediaError:
                modalities = ("video",)
            try:
                was, now = (np.median(clip_ms(path, modalities, arguments.clips)) for path in (before, after))
            except MediaError as error:
                print(f"{before.name:32s} not measured: {str(error)[:80]}")
                continue
            sizes = f"{before.stat().st_size / 1e3:7.0f} {after.stat().st_size / 1e3:7.0f}"
            print(
                f"{before.name:32s} {sizes}   {was:9.1f} {now:7.1f}   {was / now:5.1f}×    "
                f"{' and '.join(modalities)}"
            )


if __name__ == "__main__":
    main(arguments)
