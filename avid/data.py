"""Clips out of files.

In: a datasets.Table and the settings of picture and sound. A worker opens a file once, decodes frames and
sound of the chosen intervals, crops, and computes the log-mel; to_device() does the rest, batched. Out:
batches, dicts of tensors: video uint8 B×M×3×T×S×S, audio float32 B×M×1×F×bins (dB), index B; of training, the
draws of the augmentations and the labels of the temporal tasks: flip and grey B×M, jitter and mask B×M×4,
speed and direction B×M, order B; with contrast among clips, near_video B×k and far_video B×n, as for audio:
the draws of neighbours (memory_bank.draw_neighbours). M is the number of clips a video. Where files may lack
a modality (data.need=any), held bool B×2: whether each has a picture, a sound. Every random choice is a
function of (seed, step, place in the global batch), so it does not depend on workers, ranks or interruptions.
"""

if __name__ == "__main__":  # python -m avid check|prepare is python -m avid check|prepare
    from .__main__ import main

    raise SystemExit(main())

import atexit
import contextlib
import copy
import csv
import errno
import functools
import multiprocessing
import os
import re
import resource
import signal
import sys
import weakref
from collections import Counter, deque
from multiprocessing.connection import wait

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from . import config, datasets, distributed, files, memory_bank, packed, processes, temporal_tasks
from .config import ConfigError
from .media import MODALITIES, Media, MediaError, in_memory
from .media import held as held_by_file
from .spectrogram import edge_s, spectrogram, stretch

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue in grey [ITU-R BT.601]
DB_MEAN, DB_STD = -50.0, 20.0  # a log spectrogram's usual level and spread, where no statistics are given [C]
LEAST_STD = 1e-5  # added to the deviation of a band [A]
OF_A_STEP = 3  # what begins the draws of a training step: (3, step, place in the global batch)
# what torch and the system say where decoding processes cannot hand over their batches
EXHAUSTED = re.compile(
    "No space left on device|Too many open files|Cannot allocate memory|received 0 items of ancdata"
    "|[Uu]nable to .*shared memory|[Uu]nable to mmap|EOFError"
)
REMEDY = (
    "decoding processes hand batches over in /dev/shm and by open files, and one of them is exhausted "
    "(df -h /dev/shm, ulimit -n); lower data.workers or optim.batch_size (eval.batch_size), or allow more: "
    "docker run --shm-size=8g, ulimit -n 4096"
)
OPEN_FILES = 24  # of a decoding process: its pipes, and a dozen tensors of each of two batches that wait
TRIES = 20  # files a sample tries before it gives up
DEATHS = 2  # of decoding processes on a file before it is given up: the first may be the memory's fault
# else torch raises the end of a decoding process amid whatever happens just then
torch.utils.data._utils.signal_handling._SIGCHLD_handler_set = True


def random_crop(height, width, area, ratio, rng):
    """Multi-scale crop [A]: top, left, height, width with a random share of the area and a random shape."""
    for _ in range(10):
        side2 = height * width * rng.uniform(*area)
        shape = np.exp(rng.uniform(*np.log(ratio)))
        h, w = round((side2 / shape) ** 0.5), round((side2 * shape) ** 0.5)
        if 0 < h <= height and 0 < w <= width:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    return central_crop(height, width, 1.0)


def central_crop(height, width, share):
    """The central square, `share` of the short side long: top, left, height, width."""
    side = max(round(min(height, width) * share), 1)
    return (height - side) // 2, (width - side) // 2, side, side


class Clips(torch.utils.data.Dataset):
    """Clips of a table's videos.

    With training=True an item is asked for by (index, draw), draw a tuple of integers that decides everything
    random; a file that cannot be used is replaced by another one, drawn the same way. Otherwise by index:
    `cfg.eval.clips` clips evenly spaced, without augmentation; a file that cannot be used gives no tensors.
    Either way item["failures"] lists (index, reason).
    """

    def __init__(self, table, cfg, training, modalities=MODALITIES, clips=None):
        self.table, self.cfg, self.training, self.modalities = table, cfg, training, modalities
        self.clips = clips or cfg.eval.clips
        self.given_up, self.reading = {}, None  # index → why; what each decoding process reads: see Loader
        self.raw = False  # see for_device
        self.last = None, None  # with data.clips_per_open: index and media of the file that stays open
        if "audio" in modalities:
            config.band_statistics(cfg.audio)  # a ConfigError before anything is read
        self.length_s = max(
            cfg.video.frames / cfg.video.fps if "video" in modalities else 0.0,
            cfg.audio.seconds if "audio" in modalities else 0.0,
        )

    def __len__(self):
        return len(self.table)

    def __getitem__(self, key):
        index, draw = key if self.training else (key, (0, key))
        rng = np.random.default_rng((self.cfg.seed, *draw))
        failures = []
        for _ in range(TRIES):
            try:
                with self.watched(index):
                    item = self.read(index, rng) | (self.neighbours(draw) if self.training else {})
                    return {"index": index, "failures": failures, **item}
            except MediaError as error:
                number = getattr(error.__cause__, "errno", None)
                if number in (errno.EMFILE, errno.ENFILE):  # not the file's fault
                    raise OSError(number, os.strerror(number)) from None
                failures.append((index, str(error)))
            if not self.training:
                return {"index": index, "failures": failures}
            index = int(rng.integers(len(self)))
        raise MediaError(
            f"{TRIES} files in a row cannot be used, the last one {shown(self.table, failures[-1][0])}: "
            f"{failures[-1][1]}; check the folder with: python -m avid check"
        )

    def neighbours(self, draw):
        """What chance there is in the contrast's neighbours (memory_bank): drawn here, no training step waits
        for it."""
        item, (kind, *step_and_place) = {}, draw
        pretraining = kind == OF_A_STEP and self.modalities == MODALITIES  # fine-tuning takes one modality
        for key in MODALITIES if pretraining else ():
            if any(getattr(self.cfg.weights, f"contrast_{query[0]}{key[0]}") for query in MODALITIES):
                seed = memory_bank.row_seed(self.cfg.seed, key, *step_and_place)
                among = min(self.cfg.contrast.sample or len(self), len(self))
                draws = memory_bank.draw_neighbours(among, self.cfg.contrast, seed)
                item |= dict(zip((f"near_{key}", f"far_{key}"), draws, strict=True))
        return item

    @contextlib.contextmanager
    def watched(self, index):
        """Within, a decoding process has noted what it reads, and the kernel ends it after data.timeout_s."""
        if index in self.given_up:
            raise MediaError(self.given_up[index])
        process = torch.utils.data.get_worker_info()
        if process is None or self.reading is None:
            yield
            return
        self.reading[process.id] = index
        signal.setitimer(signal.ITIMER_REAL, self.cfg.data.timeout_s)  # ends even what hangs
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            self.reading[process.id] = -1

    def read(self, index, rng):
        """The clips of one video: M×…, as the module says."""
        with self.opened(index) as media:
            first_s, last_s = self.usable(media)
            if self.training:
                clips, labels = temporal_tasks.plan(first_s, last_s, self.length_s, self.cfg.temporal, rng)
                item = {name: torch.from_numpy(np.array(label)) for name, label in labels.items()}
                item |= self.draws(len(clips), rng)
            else:
                clips, item = self.evenly(first_s, last_s), {}
            if self.raw:
                item["undecoded"] = self.undecoded(media, clips, rng)
            elif "video" in self.modalities:
                item["video"] = rows_stacked([self.picture(media, clip, rng) for clip in clips])
                if media is not self.last[1]:
                    media.close_picture()
            if "audio" in self.modalities and not self.raw:
                item["audio"] = torch.stack([self.loudness(media, clip, rng) for clip in clips])
            return item

    def opened(self, index):
        """A context with the media of an instance. With data.clips_per_open above 1 a training leaves it open
        until it opens another one."""
        if not self.training or self.cfg.data.clips_per_open == 1:
            return self.open(index)
        if self.last[0] != index:
            if self.last[1]:
                self.last[1].close()
            self.last = None, None
            self.last = index, self.open(index)
        return contextlib.nullcontext(self.last[1])

    def open(self, index):
        """The media.Media of an instance, or what gives the same from memory or from a pack."""
        table = self.table
        if table.record is not None:
            return packed.PackedMedia(table.root, table.record[index], self.modalities)
        file = (table.root / table.paths[index], self.modalities, table.start_s[index], table.end_s[index])
        keeps = self.cfg.data.in_memory and self.training  # an evaluation reads a file once
        return (keeps and in_memory(*file)) or Media(*file)

    def for_device(self):
        """These clips for a Loader, whose batches go to `to_device`: as bytes where data.decode=device."""
        if self.cfg.data.decode == "cpu":
            return self
        clips = copy.copy(self)
        clips.raw = True
        return clips

    def evenly(self, first_s, last_s):
        """The clips of evaluation."""
        return temporal_tasks.evenly(first_s, last_s, self.length_s, self.clips)

    def usable(self, media):
        """Where clips may lie, s: no window of a spectrogram reaches past the sound."""
        edge = edge_s(self.cfg.audio) if "audio" in self.modalities else 0.0
        return media.first_s + edge, media.last_s - edge

    def draws(self, clips, rng):
        """What the augmentations on the device do to each clip: flip and grey M, jitter M×4, mask M×4
        (columns, bins: start, end)."""
        video, audio = self.cfg.video, self.cfg.audio
        draw = {"flip": rng.random(clips) < video.flip, "grey": rng.random(clips) < video.grey}
        most = np.array(video.jitter)  # rng.uniform of arrays draws the same, in five times the time
        draw["jitter"] = (2 * most * rng.random((clips, 4)) - most).astype(np.float32)
        width = (audio.mask_time, audio.mask_frequency) * rng.random((clips, 2))  # M×2, shares
        start = (1 - width) * rng.random((clips, 2))
        draw["mask"] = np.stack([start, start + width], 2).reshape(clips, 4).astype(np.float32)
        return {name: torch.from_numpy(values) for name, values in draw.items()}

    def start_of(self, clip, seconds):
        """Picture and sound of a clip share their middle: the shorter of the two starts later."""
        return clip.start_s + clip.speed * (self.length_s - seconds) / 2

    def moved(self, start_s, clip, media, rng):
        """Another start of a clip's picture: its middle up to video.offset_s from the sound's [A]."""
        video, reach_s = self.cfg.video, self.cfg.video.offset_s * clip.speed
        last_s = media.last_s - clip.speed * video.frames / video.fps
        low, high = max(start_s - reach_s, media.first_s), min(start_s + reach_s, last_s)
        return rng.uniform(low, high) if low < high else start_s

    def frame_times(self, media, clip, rng):
        """When the frames of a clip are shown, T s, `speed` apart. A video that is too short starts again."""
        video = self.cfg.video
        start_s = self.start_of(clip, video.frames / video.fps)
        if self.training and video.offset_s:
            start_s = self.moved(start_s, clip, media, rng)
        times = start_s + (np.arange(video.frames) + 0.5) * clip.speed / video.fps
        times = media.first_s + (times - media.first_s) % (media.last_s - media.first_s)
        return times[::-1] if clip.backward else times

    def crop(self, height, width, rng):
        """What is kept of frames of this size: top, left, height, width."""
        if not self.training:
            return central_crop(height, width, self.cfg.eval.crop)
        return random_crop(height, width, self.cfg.video.crop_area, self.cfg.video.crop_ratio, rng)

    def picture(self, media, clip, rng):
        """uint8 3×T×S×S: the frames of a clip, cropped and resized alike."""
        frames = media.frames(self.frame_times(media, clip, rng))  # T×H×W×3
        top, left, height, width = self.crop(*frames.shape[1:3], rng)
        frames = torch.from_numpy(frames[:, top : top + height, left : left + width])  # T×h×w×3
        # rows of RGB as they lie: the channels become planes in to_device
        size = {"size": [self.cfg.video.size] * 2, "mode": "bilinear", "antialias": True}
        return F.interpolate(frames.permute(0, 3, 1, 2), **size).transpose(0, 1)

    def loudness(self, media, clip, rng):
        """float32 1×F×bins, dB: the log spectrogram, with a random gain.

        Where a video is too short the sound ends in silence.
        """
        audio = self.cfg.audio
        image = spectrogram(media, self.start_of(clip, audio.seconds), audio, clip.speed)
        if self.training:
            image = (image + self.louder_db(rng)).clamp_min(-100.0)
        return image.flip(1) if clip.backward else image

    def louder_db(self, rng):
        """The random gain."""
        volume = self.cfg.audio.volume
        return 20 * np.log10(rng.uniform(1 - volume, 1 + volume))

    def undecoded(self, media, clips, rng):
        """What `picture` and `loudness` begin with, by the same draws: a dict a clip, packed.Undecoded.of."""
        audio, fields = self.cfg.audio, [{} for _ in clips]
        if "video" in self.modalities:
            for clip, found in zip(clips, fields, strict=True):
                found["jpegs"] = media.jpegs(media.shown(self.frame_times(media, clip, rng)))
                found["crop"] = self.crop(*media.size, rng)
        if "audio" in self.modalities:
            if media.rate_hz != audio.rate_hz:
                raise ConfigError(
                    f"data.decode=device needs sound packed at audio.rate_hz={audio.rate_hz}, and that of "
                    f"{self.table.root} has {media.rate_hz} Hz; pack with --audio-rate {audio.rate_hz}, or "
                    "set data.decode=cpu"
                )
            for clip, found in zip(clips, fields, strict=True):
                start_s, samples, hop = stretch(self.start_of(clip, audio.seconds), audio, clip.speed)
                found |= {"pcm": media.pcm(start_s, samples), "gain": media.gain, "hop": hop}
                found["louder_db"] = self.louder_db(rng) if self.training else None
                found["backward"] = clip.backward
        return fields


class BatchSampler(torch.utils.data.Sampler):
    """Which instances each step takes: this rank's share of every global batch from `first_step` on, as lists
    of (index, draw).

    how="epoch": shuffled passes over all n instances; "copies": over `copies` copies of each, shuffled
    together [A], so that what comes last in a pass is hardly older than the rest; "iid": every place of a
    batch drawn independently, with replacement. All are functions of (seed, step): resuming at a step, with
    any number of ranks, continues the same sequence.

    clips_per_open: so many places that follow each other take one instance, each with draws of its own; a
    step has so many times fewer instances. shards: in which shard each instance lies (n); a batch then comes
    out of one or two. In a pass one shard follows another, in random order, each shuffled; "iid": a shard is
    drawn, as often as it has instances, and the batch out of it.
    """

    def __init__(
        self, n, batch_size, how, seed, first_step, last_step, rank=0, world=1, copies=10, clips_per_open=1,
        shards=None,
    ):  # fmt: skip
        self.files = batch_size // clips_per_open  # of a step
        if self.files > n:
            what = f"a batch of {batch_size} is larger than the data set of {n} videos"
            raise ConfigError(f"{what}; lower optim.batch_size")
        if batch_size % (world * clips_per_open):
            sharing = f"{world} processes" + f", {clips_per_open} clips a file" * (clips_per_open > 1)
            raise ConfigError(f"optim.batch_size = {batch_size} clips cannot be shared evenly by {sharing}")
        self.n, self.how, self.seed, self.clips_per_open, self.shards = n, how, seed, clips_per_open, shards
        self.copies = copies if how == "copies" else 1
        self.steps = range(first_step, last_step)
        self.local = range(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.number, self.order = None, None  # of the pass that the last step was in

    def __len__(self):
        return len(self.steps)

    def global_batch(self, step):
        """The instances of a step, one for each file that it opens."""
        if self.how == "iid":
            rng = np.random.default_rng((self.seed, 1, step))
            if self.shards is None:
                return rng.integers(self.n, size=self.files)
            members = np.flatnonzero(self.shards == self.shards[rng.integers(self.n)])
            return members[rng.integers(len(members), size=self.files)]
        entries = self.copies * self.n
        number, place = divmod(step, entries // self.files)
        if number != self.number:
            rng = np.random.default_rng((self.seed, 2, number))
            self.number, self.order = number, rng.permutation(entries) % self.n
            if self.shards is not None:
                turn = rng.permutation(self.shards.max() + 1)  # of each shard
                self.order = self.order[np.argsort(turn[self.shards[self.order]], kind="stable")]
        return self.order[place * self.files : (place + 1) * self.files]

    def __iter__(self):
        for step in self.steps:
            batch = self.global_batch(step)
            yield [
                (int(batch[place // self.clips_per_open]), (OF_A_STEP, step, place)) for place in self.local
            ]


def shards(table, cfg):
    """In which shard each instance of a table lies (N); None where data.shuffle=full: it does not matter."""
    if cfg.data.shuffle == "full":
        return None
    return packed.opened(str(table.root)).index["shard"][table.record].astype(np.int64)


def held(table, index):
    """What the file of an instance holds, of MODALITIES. Raises MediaError where it is nothing."""
    if table.record is not None:
        return packed.held(table.root, table.record[index])
    return held_by_file(table.root / table.paths[index])


class AnyClips(Clips):
    """Clips of files of which each has a picture, a sound, or both, which then lie where both are.

    An item has `held`, bool 2, of MODALITIES, and no tensor of a modality that it lacks.
    """

    HOLDS = MODALITIES, ("video",), ("audio",)  # what a file can hold

    def __init__(self, table, cfg, training=True):
        super().__init__(table, cfg, training)
        self.parts = [Clips(table, cfg, training, modalities) for modalities in self.HOLDS]
        self.known = np.full(len(table), -1, np.int8)  # N, place in HOLDS; −1: not looked yet

    def part(self, index):
        """The Clips of what the file of an instance holds: a process opens a file for that once."""
        if self.known[index] < 0:
            self.known[index] = self.HOLDS.index(held(self.table, index))
        return self.parts[self.known[index]]

    def read(self, index, rng):
        part = self.part(index)
        item = part.read(index, rng)
        return item | {"held": torch.tensor([modality in part.modalities for modality in MODALITIES])}


def with_both(table):
    """The instances whose files have a picture and a sound; one that cannot be opened has none."""

    def has_both(index):
        try:
            return held(table, index) == MODALITIES
        except MediaError:
            return False

    return datasets.take(table, np.array([has_both(index) for index in range(len(table))], bool))


def training_clips(table, cfg):
    """The Clips to train on: of files with picture and sound or, with data.need=any, with either."""
    return AnyClips(table, cfg) if cfg.data.need == "any" else Clips(table, cfg, training=True)


def rows_stacked(pictures, stack=torch.stack):
    """Pictures …×3×T×S×S, stacked, whose bytes stay rows of RGB: an eighth of the time."""
    return stack([x.movedim(-4, -1) for x in pictures]).movedim(-1, -4)


def collate(items, cfg=None):
    """Items → a batch; items without tensors (files that could not be used) only leave their failures.

    cfg: config.Config, of items whose clips are bytes: they become the batch's packed.Undecoded. What a file
    does not hold (AnyClips) is lent by another one of the batch, so that batch norm sees clips and no blanks:
    `held` tells that it does not count. A modality that no file of the batch holds is None.
    """
    failures = [failure for item in items for failure in item.pop("failures")]
    whole = [item for item in items if len(item) > 1]
    lacking = {}
    for modality in MODALITIES if whole and "held" in whole[0] else ():
        lenders = [item for item in whole if modality in item]
        lacking |= {} if lenders else {modality: None}
        for k, item in enumerate(item for item in whole if modality not in item and lenders):
            item[modality] = lenders[k % len(lenders)][modality]
    videos = [item.pop("undecoded") for item in whole if "undecoded" in item]
    pictures = [item.pop("video") for item in whole if "video" in item]
    batch = torch.utils.data.default_collate(whole) if whole else {}
    if pictures:
        batch["video"] = rows_stacked(pictures, torch.utils.data.default_collate)  # into shared memory
    if videos:
        batch["undecoded"] = packed.Undecoded.of(videos, cfg.video.size, cfg.audio)
    return {**batch, **lacking, "failures": failures}


def at_start(_):
    """A decoding process is ended by its parent, by the clock, or by a batch that it cannot hand over."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(not_handed_over)


def not_handed_over(error, batch):
    """End a decoding process whose batch did not leave it: Python would go on, the parent wait for ever."""
    print(f"a batch was not handed over: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(1)


def allow_open_files(workers):
    """Raise the soft limit of open files to what so many decoding processes take. Raises ConfigError."""
    needed = len(os.listdir("/dev/fd")) + OPEN_FILES * (workers + 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            what = f"data.workers={workers} takes up to {needed} open files, {hard} are allowed"
            raise ConfigError(f"{what}: {REMEDY}")
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


DECODING = weakref.WeakSet()  # processes of all Loaders


@atexit.register
def end_decoding():
    """What an exception left behind: Python would send the SIGTERM that they ignore, and wait for ever."""
    for process in DECODING.intersection(multiprocessing.active_children()):
        process.kill()


def loader(dataset, workers, batch_sampler=None, batch_size=None):
    """Batches of Clips, in order: those of a batch sampler (lists of keys), or all of the data set,
    batch_size at a time."""
    if batch_sampler is None:
        batch_sampler = torch.utils.data.BatchSampler(range(len(dataset)), batch_size, drop_last=False)
    return Loader(dataset.for_device(), workers, batch_sampler)


class Loader:
    """Batches of Clips, decoded in processes. A decoder that dies or hangs (data.timeout_s) costs its file,
    not the run.

    When a process has ended, all begin anew at the first batch that was not yielded, with the same keys: as
    what a key gives does not depend on when it is asked for, the batches are the same bits. A file on which a
    process ended twice is given up: it counts as unusable, as one that cannot be opened. workers=0: no
    processes, and nothing is caught.
    """

    def __init__(self, clips, workers, batches):
        self.clips, self.workers, self.batches = clips, workers, batches
        self.deaths = Counter()  # index → how often a process ended on it

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        batches, begun, idle_deaths = iter(self.batches), deque(), 0

        def keys():
            yield from tuple(begun)
            for batch in batches:
                begun.append(batch)
                yield batch

        while True:
            ahead, decoding = None, []
            if self.workers:
                allow_open_files(self.workers)
            try:
                reading = torch.full((self.workers,), -1).share_memory_() if self.workers else None
                self.clips.reading = reading
                ahead = self.start(keys())
                decoding = ahead._workers if self.workers else []
                DECODING.update(decoding)
                for batch in ahead:
                    begun.popleft()
                    yield batch
                    idle_deaths = 0
                return
            except (RuntimeError, OSError, EOFError) as error:  # torch's, or of the pipe
                wait([process.sentinel for process in decoding], timeout=1.0)
                codes = {n: process.exitcode for n, process in enumerate(decoding)}
                ended = {n: code for n, code in codes.items() if code is not None}
                if not ended:
                    if exhausted := EXHAUSTED.search(f"{type(error).__name__}: {error}"):
                        raise ConfigError(f"{exhausted[0]}: {REMEDY}") from None
                    raise
                for n, code in ended.items():
                    self.blame(int(reading[n]), code)
                idle_deaths = 0 if any(reading[n] >= 0 for n in ended) else idle_deaths + 1
                if idle_deaths == 3:
                    raise ConfigError(f"decoding processes die between files: {REMEDY}") from None
            finally:
                for n, process in enumerate(decoding):
                    if process.is_alive() and reading[n] >= 0:  # in a decoder that may never return
                        process.kill()
                if self.workers and ahead is not None:
                    ahead._shutdown_workers()  # now, though an exception may keep them

    def start(self, keys):
        batches = torch.utils.data.DataLoader(
            self.clips,
            batch_sampler=keys,
            num_workers=self.workers,  # each has two batches ahead, in shared memory and then pinned
            collate_fn=functools.partial(collate, cfg=self.clips.cfg),
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=at_start,
            generator=torch.Generator(),  # the global one stays as it is
        )
        return iter(batches)

    def blame(self, index, code):
        """A process ended with this exit code while it read a file (−1: while it read none)."""
        if index < 0:
            tqdm.write(f"a decoding process died between files: {processes.ending(code)}; another goes on")
            return
        reason = f"its decoder died with {processes.ending(code)}"
        if code == -signal.SIGALRM:
            reason = f"its decoder took longer than data.timeout_s = {self.clips.cfg.data.timeout_s:g} s"
        self.deaths[index] += 1
        if self.deaths[index] >= DEATHS:
            self.clips.given_up[index] = reason
        else:
            tqdm.write(f"{shown(self.clips.table, index)}: {reason}; trying again")


def shown(table, index):
    """The path of a file in one line that any terminal takes."""
    return files.printable(table.root / table.name_of(index))


class BadFiles:
    """Files that training could not use: each named once; too many of them raise MediaError."""

    def __init__(self, table, max_share):
        self.table, self.max_share = table, max_share
        self.reasons, self.drawn, self.failed = {}, 0, 0

    def count(self, failures, used):
        """failures: (index, reason) of a batch's replaced files; used: its number of instances."""
        self.drawn, self.failed = self.drawn + used + len(failures), self.failed + len(failures)
        for index, reason in failures:
            if index not in self.reasons:
                self.reasons[index] = reason
                tqdm.write(f"skipped {shown(self.table, index)}: {reason}")
        if self.drawn >= 100 and self.failed > self.max_share * self.drawn:
            raise MediaError(
                f"{self.failed} of {self.drawn} files drawn could not be used, more than "
                f"data.max_bad_share = {self.max_share}; the lines above name them"
            )

    def state_dict(self):
        """Every rank: what all of them met, {index: reason}."""
        for reasons in distributed.gather_objects(self.reasons):
            self.reasons.update(reasons)
        return self.reasons

    def load_state_dict(self, state):
        self.reasons.update(state)

    def write(self, path):
        """Every rank, at the end: write path and reason of each file to the CSV `path`, where there is
        one."""
        if self.state_dict() and distributed.rank() == 0:
            with files.replacing(path, newline="", errors="surrogateescape") as file:
                rows = [(self.table.name_of(i), self.reasons[i]) for i in sorted(self.reasons)]
                csv.writer(file, lineterminator="\n").writerows([("path", "reason"), *rows])
            tqdm.write(f"{len(self.reasons)} files could not be used and were replaced by others: {path}")


# ------------------------------------------------------------------------------------------- on the device


def to_device(batch, device, audio):
    """Tensors moved, clips flattened (B·M first) and ready for the network: video float B·M×3×T×S×S, audio
    float B·M×1×F×bins, normalised by the statistics of `audio`, config.Audio.
    """
    batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
    if "undecoded" in batch:
        batch |= batch.pop("undecoded").decode(device)
    if batch.get("video") is not None:
        video = batch["video"].flatten(0, 1).contiguous()
        if "flip" in batch:
            video = augment(video, *(batch[draw].flatten(0, 1) for draw in ("flip", "jitter", "grey")))
        else:
            video = video.float().div_(255)
        mean, std = constant(PIXEL_MEAN, video.device), constant(PIXEL_STD, video.device)
        batch["video"] = video.sub_(mean[:, None, None, None]).div_(std[:, None, None, None])
    if batch.get("audio") is not None:
        sound = normalise(batch["audio"].flatten(0, 1).float(), audio)
        batch["audio"] = mask(sound, batch["mask"].flatten(0, 1)) if "mask" in batch else sound
    return batch


def normalise(image, audio):
    """(x − mean) / deviation of each band by audio.statistics (docs/method.md 12a) [A]; where there are none,
    −50 and 20 dB for all bands [C].

    image …×bins, dB, audio: config.Audio → float32 of the same shape. Raises ConfigError where statistics are
    missing.
    """
    if (statistics := config.band_statistics(audio)) is None:
        return (image - DB_MEAN) / DB_STD
    mean, std = (constant(values, image.device) for values in statistics)  # bins each
    return (image - mean) / (std + LEAST_STD)


@functools.lru_cache
def constant(values, device):
    """Numbers on the device, there to stay: to copy them at each step would wait for all that the device has
    to do."""
    with torch.inference_mode(False):
        return torch.tensor(values, device=device)


def mask(audio, shares):
    """Time and frequency masking: B×1×F×bins with one stretch of columns and one band of bins set to 0, the
    usual level.

    shares B×4: where the stretch starts and ends, where the band starts and ends, as shares of F and bins.
    """
    for dim, (start, end) in ((2, shares[:, :2].T), (3, shares[:, 2:].T)):
        at = (torch.arange(audio.shape[dim], device=audio.device) + 0.5) / audio.shape[dim]
        inside = (at >= start[:, None]) & (at < end[:, None])  # B×F or B×bins
        audio = audio * ~(inside[:, None, :, None] if dim == 2 else inside[:, None, None, :])
    return audio


def augment(video, flip, jitter, grey):
    """Flip and colour jitter, one draw a clip, the same for all its frames.

    video: B×3×T×S×S, uint8 or float in 0 to 1 → float; flip: bool B; jitter: B×4, offsets from 1 of
    brightness, contrast and saturation, and the hue's turn as a share of the colour circle; grey: bool B, no
    saturation. Brightness, saturation and hue are one 3×3 matrix a clip (the hue turns about the grey axis
    [C]); contrast blends with the clip's mean grey.
    """
    x = torch.where(flip[:, None, None, None, None], video.flip(-1), video)
    x = x if x.is_floating_point() else x.float().div_(255)
    luma = constant(LUMA, x.device)
    brightness, contrast, saturation = (1 + jitter[:, :3, None, None]).unbind(1)  # B×1×1 each
    saturation = torch.where(grey[:, None, None], 0.0, saturation)
    matrix = saturation * hue_rotation(jitter[:, 3]) + (1 - saturation) * luma.expand(3, 3)  # B×3×3
    matrix = brightness * matrix
    x = (matrix @ x.flatten(2)).clamp_(0, 1)  # B×3×TSS
    mean = (luma @ x.mean(2).T)[:, None, None]  # B×1×1
    return x.sub_(mean).mul_(contrast).add_(mean).clamp_(0, 1).view_as(video)


def hue_rotation(turn):
    """B×3×3 matrices that turn RGB about the grey axis by `turn` (B, 1 = once round): Rodrigues' formula."""
    angle = (2 * torch.pi * turn)[:, None, None]
    cross = constant(((0, -1, 1), (1, 0, -1), (-1, 1, 0)), turn.device) / 3**0.5
    eye = torch.eye(3, device=turn.device)
    return angle.cos() * eye + angle.sin() * cross + (1 - angle.cos()) / 3
