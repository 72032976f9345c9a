"""Pictures and sound out of packed shards, by time; and, where that is asked for, decoded on the device.

In: a folder that `python -m avid pack` has written, and the number of a record.
Out: what media.Media gives of a file: frames shown at given times, sound of an interval. Or a batch's bytes,
of which `Undecoded.decode` makes, on any device, the tensors that the CPU would have made.

A shard is an uncompressed tar in WebDataset's convention: the files of an instance follow each other and have
one stem.

    000000012.json     what it is: official name, classes, times, sizes, checksums of the sound
    000000012.npy      a row a frame (FRAME): from when it is shown, where it lies, its checksum
    000000012.mjpeg    the frames, one JPEG after another
    000000012.wav      the sound, mono, 16 bits

index.npy says where each record lies (ENTRY): a process maps the shards into memory and reads what a clip
needs. Nothing is given out before its checksum (CRC-32) was compared.
"""

import functools
import itertools
import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .media import MODALITIES, RESAMPLER_S, MediaError, faults, resampler, shown
from .spectrogram import image

ENTRY = np.dtype([("shard", "<u4"), ("json", "<u4"), ("table", "<u4"), ("crc32", "<u4"), ("at", "<u8")])
FRAME = np.dtype([("start_s", "<f8"), ("at", "<u8"), ("bytes", "<u4"), ("crc32", "<u4")])
BLOCK = 512  # of a tar: every file begins at a multiple
WAV_HEADER = 44  # bytes before the samples
SAMPLES = 16384  # of sound that share a checksum
FULL_SCALE = 32768  # of 16 bits
PIECE = 32  # clips that are resized, or transformed, at a time: some 100 MB of float32


def shard_name(number):
    return f"shard-{number:06d}.tar"


def padded(size):
    """The bytes that a file of `size` takes in a tar, without its header."""
    return -(-size // BLOCK) * BLOCK


# ------------------------------------------------------------------------------------------------- reading


class Pack:
    """A packed folder: its index, and its shards, mapped into memory when first read. No file stays open."""

    def __init__(self, root):
        self.root, self.shards = Path(root), {}
        with faults(f"{self.root / 'index.npy'} cannot be read, restore it or pack again"):
            self.index = np.load(self.root / "index.npy", mmap_mode="r", allow_pickle=False)  # records
            if self.index.dtype != ENTRY or self.index.ndim != 1:
                raise MediaError(
                    f"{self.root / 'index.npy'} is no index of a pack; restore it, or pack again"
                )

    def shard(self, number):
        """All bytes of a shard (n,) uint8, mapped."""
        if number not in self.shards:
            path = self.root / shard_name(number)
            self.shards[number] = torch.from_file(
                str(path), size=path.stat().st_size, dtype=torch.uint8
            ).numpy()
        return self.shards[number]

    def head(self, record):
        """Of a record: its shard's bytes, its .json, its .npy (FRAME), and where the next file begins."""
        if not 0 <= record < len(self.index):
            raise MediaError(f"{self.root / 'index.npy'} has no record {record}: it is cut off")
        shard, size, table_size, crc32, at = self.index[record].item()
        where = f"record {record}, {shard_name(shard)} at byte {at}"
        with faults(f"{where} cannot be read"):
            data = self.shard(shard)
            table_at = at + padded(size) + BLOCK
            text, table = data[at : at + size], data[table_at : table_at + table_size]
            if len(text) < size or len(table) < table_size or zlib.crc32(table, zlib.crc32(text)) != crc32:
                raise MediaError(f"{where} is damaged")
            facts = json.loads(text.tobytes())
            if facts["record"] != record:
                raise MediaError(f"{where} is another one, {facts['record']}")
            if not facts["picture"]:
                return data, facts, None, table_at
            rows = facts["picture"]["frames"]
            table = np.frombuffer(table, FRAME, rows, offset=table_size - rows * FRAME.itemsize)
        return data, facts, table, table_at + padded(table_size) + BLOCK


@functools.cache
def opened(root):
    """The Pack at `root`, once a process."""
    return Pack(root)


def held(root, record):
    """What a record holds, of MODALITIES. Raises MediaError."""
    _, facts, *_ = opened(str(root)).head(int(record))
    there = {"video": facts["picture"], "audio": facts["sound"]}
    return tuple(modality for modality in MODALITIES if there[modality])


class PackedMedia:
    """A record of a pack as media.Media: first_s, last_s, frames(times), sound(start, samples, rate).

    modalities: what it is wanted for. Raises MediaError where one is missing, or where the record is damaged.
    """

    def __init__(self, root, record, modalities=MODALITIES):
        self.record = int(record)
        self.bytes, facts, self.table, self.at = opened(str(root)).head(self.record)
        self.stored = {"video": facts["picture"], "audio": facts["sound"]}
        for modality in modalities:
            if not self.stored[modality]:
                raise MediaError(f"no {'picture' if modality == 'video' else 'sound'}")
        self.first_s = max(self.stored[modality]["first_s"] for modality in modalities)
        self.last_s = min(self.stored[modality]["last_s"] for modality in modalities)
        if not self.last_s > self.first_s:
            raise MediaError("picture and sound do not overlap in time")

    @property
    def size(self):
        """Height and width of the pictures."""
        return self.stored["video"]["height"], self.stored["video"]["width"]

    @property
    def rate_hz(self):
        """Sample rate of the sound."""
        return self.stored["audio"]["rate_hz"]

    @property
    def gain(self):
        """What a stored sample is multiplied by: 1/32768, or more where the sound passed full scale."""
        return self.stored["audio"]["gain"] / FULL_SCALE

    def shown(self, times_s):
        """The numbers of the frames shown at these times (T,): the first also before, the last also after."""
        return shown(self.table["start_s"], times_s)

    def jpegs(self, numbers):
        """Frames by number as they are stored: a list of uint8 arrays, views of the shard."""
        found = []
        for _, at, size, crc32 in self.table[numbers].tolist():
            data = self.bytes[self.at + at : self.at + at + size]
            if len(data) < size or zlib.crc32(data) != crc32:
                raise MediaError(f"a frame of record {self.record} is damaged")
            found.append(data)
        return found

    def frames(self, times_s):
        """The frames shown at these times (any order, repeats allowed): uint8 T×H×W×3."""
        numbers = self.shown(times_s).tolist()
        wanted = list(dict.fromkeys(numbers))
        jpegs = [torch.from_numpy(data) for data in self.jpegs(wanted)]
        with faults("picture cannot be decoded"):
            images = dict(zip(wanted, decode_jpegs(jpegs), strict=True))
            return torch.stack([images[k].permute(1, 2, 0) for k in numbers]).numpy()

    def pcm(self, start_s, samples):
        """`samples` of the stored sound from start_s on: int16, times `gain`; zeros where there is none."""
        sound, placed = self.stored["audio"], np.zeros(samples, np.int16)
        begin = round((start_s - sound["first_s"]) * self.rate_hz)
        first, last = max(begin, 0), min(begin + samples, sound["samples"])
        if first >= last:
            return placed
        picture = self.stored["video"]
        at = self.at + (padded(picture["bytes"]) + BLOCK if picture else 0) + WAV_HEADER
        for k in range(first // SAMPLES, (last - 1) // SAMPLES + 1):
            stretch = self.bytes[at + 2 * k * SAMPLES : at + 2 * min((k + 1) * SAMPLES, sound["samples"])]
            if zlib.crc32(stretch) != sound["crc32"][k]:
                raise MediaError(f"the sound of record {self.record} is damaged")
        stored = self.bytes[at + 2 * first : at + 2 * last].tobytes()  # of any alignment
        placed[first - begin : last - begin] = np.frombuffer(stored, "<i2")
        return placed

    def sound(self, start_s, samples, rate_hz):
        """`samples` samples of mono sound at rate_hz from start_s on: float32; silence where it has none."""
        if rate_hz == self.rate_hz:
            return self.pcm(start_s, samples) * np.float32(self.gain)
        seconds = samples / rate_hz + 2 * RESAMPLER_S
        source = self.pcm(start_s - RESAMPLER_S, round(seconds * self.rate_hz)) * np.float32(self.gain)
        skip = round(RESAMPLER_S * rate_hz)
        return resampler(self.rate_hz, rate_hz)(torch.from_numpy(source))[skip : skip + samples].numpy()

    def close_picture(self):
        """Nothing is open."""

    close = close_picture

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Nothing is open."""


def decode_jpegs(files, device=None):
    """RGB images 3×H×W uint8 of JPEG files, a tensor of bytes each; on the device, where one is given."""
    from torchvision import io  # here: it takes two seconds

    if device is None:  # torchvision's operation itself: its function around takes a sixth of the time
        return [torch.ops.image.decode_jpeg(file, io.ImageReadMode.RGB.value, False) for file in files]
    return io.decode_jpeg(files, io.ImageReadMode.RGB, device)


# ------------------------------------------------------------------------------------------- on the device


@dataclass
class Undecoded:
    """A batch of B videos with M clips each as bytes: what decoding processes give where data.decode=device.

    The frames of all clips lie one behind the other. So do the sounds, those with equal hops together: with
    another speed a clip has another hop, and another number of samples. None: not wanted.
    """

    shape: tuple  # B, M
    size: int  # S, side of the square clips
    audio: object  # config.Audio
    jpegs: torch.Tensor | None = None  # uint8, of all frames
    jpeg_bytes: np.ndarray | None = None  # B·M×T
    crop: torch.Tensor | None = None  # B·M×4 int64: top, left, height, width
    pcm: torch.Tensor | None = None  # int16, of all sounds
    hops: list | None = None  # (samples from one column to the next, number of clips, samples of each)
    place: torch.Tensor | None = None  # B·M int64, where each clip stands among the sounds
    gain: torch.Tensor | None = None  # B·M float32, what a sample is multiplied by; in the sounds' order
    louder_db: torch.Tensor | None = None  # B·M float32, the random gain of training
    backward: torch.Tensor | None = None  # B·M bool

    @classmethod
    def of(cls, videos, size, audio):
        """videos: B lists of M dicts, what data.Clips.undecoded gives."""
        clips, fields = [clip for video in videos for clip in video], {}

        def tensor(name, kind, order=None):
            values = np.array([clip[name] for clip in clips], kind)
            return torch.from_numpy(values if order is None else values[order])

        if "jpegs" in clips[0]:
            jpegs = [data for clip in clips for data in clip["jpegs"]]
            fields["jpegs"] = torch.from_numpy(np.concatenate(jpegs))
            fields["jpeg_bytes"] = np.array([len(data) for data in jpegs]).reshape(len(clips), -1)
            fields["crop"] = tensor("crop", np.int64)
        if "pcm" in clips[0]:
            order = sorted(range(len(clips)), key=lambda k: clips[k]["hop"])
            groups = itertools.groupby((clips[k] for k in order), key=lambda clip: clip["hop"])
            groups = [(hop, [clip["pcm"] for clip in alike]) for hop, alike in groups]
            fields["pcm"] = torch.from_numpy(np.concatenate([wave for _, waves in groups for wave in waves]))
            fields["hops"] = [(hop, len(waves), len(waves[0])) for hop, waves in groups]
            fields["place"] = torch.from_numpy(np.argsort(order))
            fields["gain"], fields["backward"] = tensor("gain", np.float32, order), tensor("backward", bool)
            if clips[0]["louder_db"] is not None:
                fields["louder_db"] = tensor("louder_db", np.float32)
        return cls((len(videos), len(videos[0])), size, audio, **fields)

    def pin_memory(self):
        """What is copied to the device; JPEGs are decoded out of any memory."""
        copied = {name: x for name, x in vars(self).items() if torch.is_tensor(x) and name != "jpegs"}
        return replace(self, **{name: x.pin_memory() for name, x in copied.items()})

    def decode(self, device):
        """{"video": uint8 B×M×3×T×S×S, "audio": float32 B×M×1×F×bands, dB} on the device, as far as wanted.

        They differ from the CPU's by rounding: a picture by 1 of 255 where both are given the same frames
        (JPEG decoders round in ways of their own), a decibel above −80 dB by 0.01.
        """
        batch = {}
        if self.jpegs is not None:
            batch["video"] = self.pictures(device)
        if self.pcm is not None:
            batch["audio"] = self.sounds(device)
        return {name: x.unflatten(0, self.shape) for name, x in batch.items()}

    def pictures(self, device):
        """uint8 B·M×3×T×S×S."""
        frames, crop = self.jpeg_bytes.shape[1], self.crop.to(device, non_blocking=True)
        jpegs = self.jpegs.split(self.jpeg_bytes.ravel().tolist())
        images = decode_jpegs(list(jpegs), device)
        clips = range(0, len(images), PIECE * frames)
        pieces = [stacked(images[k : k + PIECE * frames], frames) for k in clips]
        return torch.cat([resize(x, c, self.size) for x, c in zip(pieces, crop.split(PIECE), strict=True)])

    def sounds(self, device):
        """float32 B·M×1×F×bands, dB."""
        pcm, place, gain, backward = (
            x.to(device, non_blocking=True) for x in (self.pcm, self.place, self.gain, self.backward)
        )
        sizes, counts = [n * samples for _, n, samples in self.hops], [n for _, n, _ in self.hops]
        images = []
        for (hop, n, _), waves, gains in zip(self.hops, pcm.split(sizes), gain.split(counts), strict=True):
            waves = waves.view(n, -1) * gains[:, None]  # n×N
            images += [image(some, self.audio, hop) for some in waves.split(PIECE)]  # n×F×bands
        found = torch.cat(images)[place, None]
        if self.louder_db is not None:
            louder_db = self.louder_db.to(device, non_blocking=True)
            found = (found + louder_db[:, None, None, None]).clamp_min(-100.0)
        return torch.where(backward[:, None, None, None], found.flip(2), found)


def stacked(images, frames):
    """n·T images 3×h×w, those of a clip alike, as n×T×3×H×W: the smaller ones fill the top left corner."""
    clips = [images[k : k + frames] for k in range(0, len(images), frames)]
    if len({image.shape for image in images}) == 1:
        return torch.stack(images).unflatten(0, (-1, frames))
    height, width = (max(image.shape[side] for image in images) for side in (1, 2))
    together = images[0].new_zeros(len(clips), frames, 3, height, width)
    for place, clip in zip(together, clips, strict=True):
        place[:, :, : clip[0].shape[1], : clip[0].shape[2]] = torch.stack(clip)
    return together


def resize(frames, crop, size):
    """A crop of its own of each clip, resized: bilinear, antialiased. For all at once two matrix products.

    frames n×T×3×H×W uint8; crop n×4: top, left, height, width → n×3×T×S×S uint8. As torch's interpolate with
    antialias=True, but for its rounding between the two directions.
    """
    top, left, height, width = crop.unbind(1)  # n each
    down = resize_matrix(top, height, frames.shape[3], size)  # n×S×H
    across = resize_matrix(left, width, frames.shape[4], size)  # n×S×W
    x = torch.einsum("ntchw,nsw->nctsh", frames.float(), across)  # n×3×T×S×H
    x = torch.einsum("nctsh,nrh->nctrs", x, down)  # n×3×T×S×S
    return x.round_().clamp_(0, 255).to(torch.uint8)


def resize_matrix(begin, length, extent, size):
    """n×S×extent: row s holds the weights of the source's pixels in the s-th of S pixels, made of a crop.

    begin, length n: of the crops. A triangle about the pixel's middle, as wide as the pixel or, where the
    crop is enlarged, as a pixel of the source.
    """
    scale = (length / size)[:, None, None]  # n×1×1
    middle = begin[:, None, None] + (torch.arange(size, device=begin.device)[:, None] + 0.5) * scale  # n×S×1
    pixel = torch.arange(extent, device=begin.device) + 0.5  # extent
    weight = 1 - (pixel - middle).abs() / scale.clamp_min(1)  # n×S×extent
    within = (pixel > begin[:, None, None]) & (pixel < (begin + length)[:, None, None])  # n×1×extent
    weight = weight.clamp_min(0) * within
    return weight / weight.sum(2, keepdim=True)
