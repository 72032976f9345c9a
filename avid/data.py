"""Clips out of files.

In: a datasets.Table and the settings of picture and sound. A worker opens a file once, decodes frames and sound of the
chosen intervals, crops, and computes the log-mel; to_device() does the rest, batched.
Out: batches, dicts of tensors: video uint8 B×M×3×T×S×S, audio float32 B×M×1×F×bins (dB), index B; of training, the draws of the
augmentations and the labels of the temporal tasks: flip and grey B×M, jitter and mask B×M×4, speed and direction B×M, order B.
M is the number of clips a video. Every random choice is a function of (seed, step, place in the global batch), so it does
not depend on workers, ranks or interruptions.
"""

if __name__ == "__main__":  # python -m avid.data check|prepare; before the heavy imports: --help answers at once
    from .prepare import main

    main()

import signal

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from tqdm import tqdm

from . import temporal_tasks
from .config import ConfigError
from .media import MODALITIES, Media, MediaError, spectrogram

PIXEL_MEAN, PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
DB_MEAN, DB_STD = -50.0, 20.0  # a log spectrogram's usual level and spread [C]
TRIES = 20  # files a sample tries before it gives up


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

    With training=True an item is asked for by (index, draw), draw a tuple of integers that decides everything random; a file
    that cannot be used is replaced by another one, drawn the same way. Otherwise by index: `cfg.eval.clips` clips evenly
    spaced, without augmentation; a file that cannot be used gives no tensors. Either way item["failures"] lists (index, reason).
    """

    def __init__(self, table, cfg, training, modalities=MODALITIES, clips=None):
        self.table, self.cfg, self.training, self.modalities = table, cfg, training, modalities
        self.clips = clips or cfg.eval.clips
        self.length_s = max(
            cfg.video.frames / cfg.video.fps if "video" in modalities else 0.0,
            cfg.audio.seconds if "audio" in modalities else 0.0,
        )

    def __len__(self):
        return len(self.table.paths)

    def __getitem__(self, key):
        index, draw = key if self.training else (key, (0, key))
        rng = np.random.default_rng((self.cfg.seed, *draw))
        failures = []
        for _ in range(TRIES):
            try:
                return {"index": index, "failures": failures, **self.read(index, rng)}
            except MediaError as error:
                failures.append((index, str(error)))
            if not self.training:
                return {"index": index, "failures": failures}
            index = int(rng.integers(len(self)))
        raise MediaError(
            f"{TRIES} files in a row cannot be used, the last one {self.table.root / self.table.paths[failures[-1][0]]}: "
            f"{failures[-1][1]}; check the folder with: python -m avid.data check"
        )

    def read(self, index, rng):
        """The clips of one video: M×…, as the module says."""
        table = self.table
        path = table.root / table.paths[index]
        with Media(path, self.modalities, table.start_s[index], table.end_s[index]) as media:
            first_s, last_s = self.usable(media)
            if self.training:
                clips, labels = temporal_tasks.plan(first_s, last_s, self.length_s, self.cfg.temporal, rng)
                item = {name: torch.tensor(label) for name, label in labels.items()} | self.draws(len(clips), rng)
            else:
                clips, item = self.evenly(first_s, last_s), {}
            if "video" in self.modalities:
                item["video"] = torch.stack([self.picture(media, clip, rng) for clip in clips])
            if "audio" in self.modalities:
                item["audio"] = torch.stack([self.loudness(media, clip, rng) for clip in clips])
            return item

    def evenly(self, first_s, last_s):
        """The clips of evaluation."""
        return temporal_tasks.evenly(first_s, last_s, self.length_s, self.clips)

    def usable(self, media):
        """Where clips may lie, s: no window of a spectrogram reaches past the sound."""
        edge_s = self.cfg.audio.n_fft / 2 / self.cfg.audio.rate_hz if "audio" in self.modalities else 0.0
        return media.first_s + edge_s, media.last_s - edge_s

    def draws(self, clips, rng):
        """What the augmentations on the device do to each clip: flip and grey M, jitter M×4, mask M×4 (columns, bins: start, end)."""
        video, audio = self.cfg.video, self.cfg.audio
        draw = {"flip": rng.random(clips) < video.flip, "grey": rng.random(clips) < video.grey}
        draw["jitter"] = rng.uniform(-np.array(video.jitter), video.jitter, (clips, 4)).astype(np.float32)
        width = rng.uniform(0, (audio.mask_time, audio.mask_frequency), (clips, 2))  # M×2, shares
        start = rng.uniform(0, 1 - width)
        draw["mask"] = np.stack([start, start + width], 2).reshape(clips, 4).astype(np.float32)
        return {name: torch.from_numpy(values) for name, values in draw.items()}

    def start_of(self, clip, seconds):
        """Picture and sound of a clip share their middle: the shorter of the two starts later."""
        return clip.start_s + clip.speed * (self.length_s - seconds) / 2

    def picture(self, media, clip, rng):
        """uint8 3×T×S×S: frames `speed` apart, cropped and resized alike. A video that is too short starts again (loops)."""
        video = self.cfg.video
        start_s = self.start_of(clip, video.frames / video.fps)
        times = start_s + (np.arange(video.frames) + 0.5) * clip.speed / video.fps
        times = media.first_s + (times - media.first_s) % (media.last_s - media.first_s)
        frames = media.frames(times[::-1] if clip.backward else times)  # T×H×W×3
        height, width = frames.shape[1:3]
        if self.training:
            crop = random_crop(height, width, video.crop_area, video.crop_ratio, rng)
        else:
            crop = central_crop(height, width, self.cfg.eval.crop)
        frames = torch.from_numpy(frames).permute(0, 3, 1, 2)  # T×3×H×W
        return TF.resized_crop(frames, *crop, [video.size, video.size], antialias=True).transpose(0, 1).contiguous()

    def loudness(self, media, clip, rng):
        """float32 1×F×bins, dB: the log spectrogram, with a random gain. Where a video is too short the sound ends in silence."""
        audio = self.cfg.audio
        image = spectrogram(media, self.start_of(clip, audio.seconds), audio, clip.speed)
        if self.training:
            image = (image + 20 * np.log10(rng.uniform(1 - audio.volume, 1 + audio.volume))).clamp_min(-100.0)
        return image.flip(1) if clip.backward else image


class Draws(torch.utils.data.Sampler):
    """Which instances each step takes: this rank's share of every global batch from `first_step` on, as lists of (index, draw).

    how="epoch": shuffled passes over all n instances; how="iid": every place of a batch drawn independently. Both are functions of
    (seed, step): resuming at a step, with any number of ranks, continues the same sequence.
    """

    def __init__(self, n, batch_size, how, seed, first_step, last_step, rank=0, world=1):
        if batch_size > n:
            raise ConfigError(f"a batch of {batch_size} is larger than the data set of {n} videos; lower optim.batch_size")
        if batch_size % world:
            raise ConfigError(f"optim.batch_size = {batch_size} clips cannot be shared evenly by {world} processes")
        self.n, self.batch_size, self.how, self.seed = n, batch_size, how, seed
        self.steps = range(first_step, last_step)
        self.mine = range(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.epoch, self.order = None, None

    def __len__(self):
        return len(self.steps)

    def global_batch(self, step):
        """The batch_size instances of a step."""
        if self.how == "iid":
            return np.random.default_rng((self.seed, 1, step)).integers(self.n, size=self.batch_size)
        epoch, place = divmod(step, self.n // self.batch_size)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng((self.seed, 2, epoch)).permutation(self.n)
        return self.order[place * self.batch_size : (place + 1) * self.batch_size]

    def __iter__(self):
        for step in self.steps:
            batch = self.global_batch(step)
            yield [(int(batch[place]), (3, step, place)) for place in self.mine]


def collate(items):
    """Items → a batch; items without tensors (files that could not be used) only leave their failures."""
    failures = [failure for item in items for failure in item.pop("failures")]
    whole = [item for item in items if len(item) > 1]
    batch = torch.utils.data.default_collate(whole) if whole else {}
    return {**batch, "failures": failures}


def leave_signals_to_the_parent(_):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def loader(dataset, workers, batch_sampler=None, batch_size=None):
    """A DataLoader over Clips: decoding processes that leave the ending to their parent, pinned memory for a GPU."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        **({} if batch_sampler is not None else {"batch_size": batch_size}),
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        worker_init_fn=leave_signals_to_the_parent,
    )


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
                tqdm.write(f"skipped {self.table.root / self.table.paths[index]}: {reason}")
        if self.drawn >= 100 and self.failed > self.max_share * self.drawn:
            raise MediaError(
                f"{self.failed} of {self.drawn} files drawn could not be used, more than data.max_bad_share = {self.max_share}; "
                "the lines above name them"
            )

    def report(self):
        if self.reasons:
            tqdm.write(f"{len(self.reasons)} files could not be used and were replaced by others; the log names each once")


# ------------------------------------------------------------------------------------------- on the device


def to_device(batch, device):
    """Tensors moved, clips flattened (B·M first) and ready for the network: video float B·M×3×T×S×S, audio float B·M×1×F×bins."""
    batch = {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
    if "video" in batch:
        video = batch["video"].flatten(0, 1).float() / 255
        if "flip" in batch:
            video = augment(video, *(batch[draw].flatten(0, 1) for draw in ("flip", "jitter", "grey")))
        mean, std = video.new_tensor(PIXEL_MEAN), video.new_tensor(PIXEL_STD)
        batch["video"] = (video - mean[:, None, None, None]) / std[:, None, None, None]
    if "audio" in batch:
        audio = (batch["audio"].flatten(0, 1).float() - DB_MEAN) / DB_STD
        batch["audio"] = mask(audio, batch["mask"].flatten(0, 1)) if "mask" in batch else audio
    return batch


def mask(audio, shares):
    """Time and frequency masking: B×1×F×bins with one stretch of columns and one band of bins set to 0, the usual level.

    shares B×4: where the stretch starts and ends, where the band starts and ends, as shares of F and bins.
    """
    keep = torch.ones_like(audio, dtype=torch.bool)
    for dim, (start, end) in ((2, shares[:, :2].T), (3, shares[:, 2:].T)):
        at = (torch.arange(audio.shape[dim], device=audio.device) + 0.5) / audio.shape[dim]
        inside = (at >= start[:, None]) & (at < end[:, None])  # B×F or B×bins
        keep &= ~(inside[:, None, :, None] if dim == 2 else inside[:, None, None, :])
    return audio * keep


def augment(video, flip, jitter, grey):
    """Flip and colour jitter, one draw a clip, the same for all its frames.

    video: float B×3×T×S×S in 0 to 1; flip: bool B; jitter: B×4, offsets from 1 of brightness, contrast and saturation, and the
    hue's turn as a share of the colour circle; grey: bool B, no saturation. Brightness, saturation and hue are one 3×3 matrix a clip (the hue turns about the
    grey axis [C]); contrast blends with the clip's mean grey.
    """
    x = torch.where(flip[:, None, None, None, None], video.flip(-1), video)
    luma = x.new_tensor([0.299, 0.587, 0.114])
    brightness, contrast, saturation = (1 + jitter[:, :3, None, None]).unbind(1)  # B×1×1 each
    saturation = torch.where(grey[:, None, None], 0.0, saturation)
    matrix = brightness * (saturation * hue_rotation(jitter[:, 3]) + (1 - saturation) * luma.expand(3, 3))  # B×3×3
    x = (matrix @ x.flatten(2)).clamp_(0, 1)  # B×3×TSS
    mean = (luma @ x.mean(2).T)[:, None, None]  # B×1×1
    return (contrast * (x - mean) + mean).clamp_(0, 1).view_as(video)


def hue_rotation(turn):
    """B×3×3 matrices that turn RGB about the grey axis by `turn` (B, 1 = once round): Rodrigues' formula."""
    angle = (2 * torch.pi * turn)[:, None, None]
    cross = turn.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    eye = torch.eye(3, device=turn.device)
    return angle.cos() * eye + angle.sin() * cross + (1 - angle.cos()) / 3
