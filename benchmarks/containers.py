"""Which container suits packed data? Compares size on disk, listing by other tools, and cost of a sample.

    python benchmarks/containers.py [--videos 60] [--samples 60] [--folder DIR] [--json FILE]

The synthetic videos of 10 s of benchmarks/loader.py's setting A (short side 128, 16 frames a second), in:

    mp4                  as `python -m avid prepare` writes them: H.264, a key frame every 32, AAC
    mov                  the same frames as motion JPEG with plain sound, a file a video
    tar, a file a frame  WebDataset's way for pictures: KEY.json, KEY.000.jpg, KEY.001.jpg, …, KEY.wav
    tar, a file a video  as `python -m avid pack` writes them: KEY.json, KEY.npy, KEY.mjpeg, KEY.wav

    MB, beside         size of a video, and the share of it that is neither frames nor sound
    files              in the container, a video
    list, all          milliseconds a video: Python's tarfile lists a tar; WebDataset reads all, if installed
    sample             milliseconds of processor time to open and to decode 8 frames and 2 s of sound, medians

Both tars are read by memory map and index, so one measurement of a sample stands for both.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from avid import cli


def command_line():
    parser = cli.CommandLine(description=__doc__, formatter_class=cli.Help)
    parser.add_argument("--videos", type=int, default=60, metavar="N", help="in a container (default: 60)")
    parser.add_argument("--samples", type=int, default=60, metavar="N", help="default: 60")
    parser.add_argument(
        "--folder", metavar="DIR", help="where the files are, or will be (default: a temporary one)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser.parse_args()


if __name__ == "__main__":  # before the heavy imports: --help answers at once
    arguments = command_line()

import io
import tarfile
import tempfile
import time
from fractions import Fraction

import loader
import numpy as np
import report

from avid.media import Media, av
from avid.packed import PackedMedia

SECONDS, FPS, RATE_HZ = 10.0, 16, 24000


def members(shard):
    """The files of a shard by record: [{ending: bytes}]."""
    found = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, ending = member.name.partition(".")
            found.setdefault(key, {})[ending] = tar.extractfile(member).read()
    return [*found.values()]


def jpegs(files):
    rows = np.load(io.BytesIO(files["npy"]), allow_pickle=False)
    return [files["mjpeg"][row["at"] :][: row["bytes"]] for row in rows]


def mov(path, files):
    """A record as a file of motion JPEG and plain sound; nothing is encoded again."""
    with av.open(str(path), "w", format="mov") as out:
        video, sound = (
            out.add_stream("mjpeg", rate=FPS),
            out.add_stream("pcm_s16le", rate=RATE_HZ, layout="mono"),
        )
        image = av.open(io.BytesIO(jpegs(files)[0]), format="mjpeg").streams.video[0]
        video.width, video.height, video.pix_fmt = image.width, image.height, "yuvj420p"
        sound.time_base = video.time_base = Fraction(1, RATE_HZ)
        pcm = files["wav"][44:]
        for k, jpeg in enumerate(jpegs(files)):
            for stream, data, pts in (
                (video, jpeg, k * RATE_HZ // FPS),
                (sound, pcm[2 * k * RATE_HZ // FPS : 2 * (k + 1) * RATE_HZ // FPS], k * RATE_HZ // FPS),
            ):
                packet = av.Packet(data)
                packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, pts, pts, True
                packet.time_base, packet.duration = Fraction(1, RATE_HZ), RATE_HZ // FPS
                out.mux(packet)


def write_tar(path, records, by_frame, count):
    """`count` records as a tar: repeated under keys of their own."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for k in range(count):
            files = records[k % len(records)]
            if by_frame:
                frames = {f"{n:03d}.jpg": jpeg for n, jpeg in enumerate(jpegs(files))}
                files = {"json": files["json"], **frames, "wav": files["wav"]}
            for ending, content in files.items():
                member = tarfile.TarInfo(f"{k:09d}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def listed_ms(path, count):
    begun = time.process_time()
    with tarfile.open(path) as tar:
        tar.getmembers()
    return 1e3 * (time.process_time() - begun) / count


def webdataset_ms(path, count):
    try:
        import webdataset
    except ImportError:
        return ""
    begun = time.process_time()
    assert sum(1 for _ in webdataset.WebDataset(str(path), shardshuffle=False)) == count
    return 1e3 * (time.process_time() - begun) / count


def sample(media, rng):
    start_s = rng.uniform(0, SECONDS - 2)
    with media() as opened:
        opened.frames(start_s + (np.arange(8) + 0.5) / FPS)
        opened.close_picture()
        opened.sound(start_s, 2 * RATE_HZ, RATE_HZ)


def main(arguments):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(arguments.folder or folder).resolve()
        files = loader.write(folder, 4)["prepared"]
        found = loader.packed(files, 128, RATE_HZ)
        records = [record for path in sorted(found.root.glob("*.tar")) for record in members(path)]
        paths = [files.root / path for path in files.paths]
        movs = [folder / f"{k}.mov" for k in range(len(records))]
        for path, record in zip(movs, records, strict=True):
            mov(path, record)
        tars = {"frame": folder / "frames.tar", "video": folder / "videos.tar"}
        for what, path in tars.items():
            write_tar(path, records, what == "frame", arguments.videos)
        payload = np.mean([len(x["mjpeg"]) + len(x["wav"]) for x in records])
        forms = {
            "mp4": lambda k: Media(paths[k]),
            "mov": lambda k: Media(movs[k]),
            "tar, a file a video": lambda k: PackedMedia(found.root, found.record[k]),
        }
        rng, ms = np.random.default_rng(0), {name: [] for name in forms}
        for k in range(arguments.samples + 8):
            seed = rng.integers(2**32)
            for name, open_it in forms.items():
                begun = time.process_time()
                sample(lambda open_it=open_it, k=k: open_it(k % 4), np.random.default_rng(seed))
                ms[name].append(1e3 * (time.process_time() - begun))
        rows = []
        for name, some in (
            ("mp4", paths),
            ("mov", movs),
            ("tar, a file a frame", "frame"),
            ("tar, a file a video", "video"),
        ):
            row = {"form": name}
            if name.startswith("tar"):
                each = tars[some].stat().st_size / arguments.videos
                row |= {"MB": each / 1e6, "beside, %": 100 * (each - payload) / each}
                row["files"] = 2 + np.mean([len(jpegs(x)) for x in records]) if some == "frame" else 4.0
                row["list, ms"] = listed_ms(tars[some], arguments.videos)
                row["all, ms"] = webdataset_ms(tars[some], arguments.videos)
            else:
                each = np.mean([path.stat().st_size for path in some])
                row |= {"MB": each / 1e6, "files": 1.0}
                if name == "mov":
                    row["beside, %"] = 100 * (each - payload) / each
            row["sample, ms"] = float(np.median(ms.get(name, ms["tar, a file a video"])[8:]))
            rows.append(row)
        report.show("A video of 10 s by its container", rows, arguments.json)


if __name__ == "__main__":
    main(arguments)
