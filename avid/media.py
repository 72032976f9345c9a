"""Pictures and sound out of one file, by time.

In: a path. Frames come from decord, sound from PyAV, on one clock that begins with the file.
Out: frames shown at given times, mono sound of an interval.
"""

import contextlib
import functools
import itertools
import os
import re
from fractions import Fraction

import torch

# isort: split
import av
import decord  # after torch: it offers NVIDIA's BLAS to every library loaded later, and torch's sums on a CPU end in a crash
import numpy as np
import torchaudio

MODALITIES = ("video", "audio")
WARM_UP_S = 0.15  # sound that a decoder needs before it is right
RESAMPLER_S = 0.01  # more than the resampler's reach
LOWEST_HZ, HIGHEST_HZ = 1000, 768000  # of sound; other rates stand in damaged headers

decord.logging.set_level(decord.logging.QUIET)  # what cannot be decoded is a MediaError


class MediaError(Exception):
    """A file that cannot be used, and why, in one line."""


class Media:
    """An open file: frames by decord, sound by PyAV, on one clock that begins with the file.

    first_s and last_s bound the part where every wanted modality is present; start_s and end_s narrow it further.
    Raises MediaError where a wanted modality is missing or cannot be read.
    """

    def __init__(self, path, modalities=MODALITIES, start_s=0.0, end_s=np.inf):
        self.path, self.container, self.reader = (
            os.path.abspath(path),
            None,
            None,
        )  # a relative one may look like http:…
        self.first_s, self.last_s = start_s, end_s
        with contextlib.ExitStack() as in_vain, faults("cannot be opened"):
            in_vain.callback(self.close)
            self.container = av.open(self.path, metadata_errors="ignore")
            self.origin_s = (self.container.start_time or 0) / av.time_base
            if "audio" in modalities:
                self._open_sound()
            if "video" in modalities:
                self._open_picture()
            if not self.last_s > self.first_s:
                raise MediaError("picture and sound, or the asked part, do not overlap in time")
            if self.last_s == np.inf:
                raise MediaError(
                    "its length is not known; write it anew, for example with: python -m avid prepare"
                )
            in_vain.pop_all()

    def _open_sound(self):
        self.stream = self.container.streams.best("audio")
        if self.stream is None:
            raise MediaError("no sound")
        if self.stream.codec_context is None or not self.stream.rate:
            raise MediaError("sound of an unknown codec or rate")
        if not LOWEST_HZ <= self.stream.rate <= HIGHEST_HZ:
            raise MediaError(f"sound at an impossible rate of {self.stream.rate} Hz")
        self.stream.thread_count = 1
        self.source_hz = self.stream.rate
        first_s, last_s = self._start_s(self.stream), np.inf
        if self.stream.duration:
            last_s = first_s + float(self.stream.duration * self.stream.time_base)
        elif self.container.duration:
            last_s = self.container.duration / av.time_base
        self._usable(first_s, last_s)
        self.sound_first_s = first_s
        self.promised_s = last_s if self.stream.duration else first_s  # until when there has to be sound

    def _open_picture(self):
        picture = self.container.streams.best("video")
        if picture is None or picture.disposition & av.stream.Disposition.attached_pic:  # a cover is none
            raise MediaError("no picture")
        self.reader = decord.VideoReader(self.path, num_threads=1)
        if not len(self.reader):
            raise MediaError("no picture in the video stream")
        times = frame_times(self.reader)
        self.in_order = times is None or not decord_finds_frames(self.container, picture)
        if times is None:  # of a container of constant rate: MPEG program stream, AVI with B frames
            times = np.arange(len(self.reader)) / self.reader.get_avg_fps()
        self.frame_starts = self._start_s(picture) + times
        self._usable(self.frame_starts[0], self.frame_starts[-1] + 1 / self.reader.get_avg_fps())

    def _start_s(self, stream):
        return (
            float(stream.start_time * stream.time_base) - self.origin_s
            if stream.start_time is not None
            else 0.0
        )

    def _usable(self, first_s, last_s):
        self.first_s, self.last_s = max(self.first_s, first_s), min(self.last_s, last_s)

    def shown(self, times_s):
        """The numbers of the frames shown at these times (T,): the first one also before, the last one also after."""
        shown = (
            np.searchsorted(self.frame_starts, np.asarray(times_s) + 1e-4, side="right") - 1
        )  # decord's times are float32
        return shown.clip(0, len(self.frame_starts) - 1)

    def frames(self, times_s):
        """The frames shown at these times (any order, repeats allowed): uint8 T×H×W×3."""
        wanted, back = np.unique(self.shown(times_s), return_inverse=True)
        with faults("picture cannot be decoded"):
            return (
                self._frames_in_order(wanted) if self.in_order else self.reader.get_batch(wanted).asnumpy()
            )[back]

    def _frames_in_order(self, wanted):
        """Frames by ascending number, out of all from the file's beginning on: slow, and right where decord is not."""
        images, frame = [], None
        with av.open(self.path, metadata_errors="ignore") as container:
            stream = container.streams.best("video")
            stream.thread_count = 1
            for number, frame in enumerate(container.decode(stream)):
                if number == wanted[len(images)]:
                    images.append(_upright(frame))
                    if len(images) == len(wanted):
                        break
            if frame is None:
                raise ValueError("no frame")
            images += [_upright(frame)] * (len(wanted) - len(images))
        return np.stack(images)

    def sound(self, start_s, samples, rate_hz):
        """`samples` samples of mono sound at rate_hz from start_s on: float32; silence where the file has none."""
        with faults("sound cannot be decoded"):
            source = self._decode(start_s - RESAMPLER_S, samples / rate_hz + 2 * RESAMPLER_S)
        source = torch.from_numpy(source).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        waveform = resampler(self.source_hz, rate_hz)(source)
        skip = round(RESAMPLER_S * rate_hz)
        return waveform[skip : skip + samples].numpy()

    def _decode(self, start_s, seconds):
        """The sound of an interval at the file's own rate, from a place before it on or else from the file's beginning."""
        for from_s in (start_s - WARM_UP_S, 0.0):
            self._seek(from_s)
            try:
                placed = self._place(start_s, seconds, sought=from_s > 0)
            except av.error.InvalidDataError:  # some containers' index leads into the middle of a packet
                if from_s <= 0:
                    raise
            else:
                if placed is not None:
                    return placed

    def _seek(self, time_s):
        # not every container can be asked for a time before its beginning, where others have a lead-in
        for at_s in (time_s, 0.0):
            try:
                return self.container.seek(
                    int((at_s + self.origin_s) / self.stream.time_base), stream=self.stream
                )
            except av.FFmpegError:
                if at_s == 0:
                    raise

    def _place(self, start_s, seconds, sought):
        """The sound from here on, placed by its time stamps in the interval, mixed to mono. None: this place is too late."""
        source_hz = self.source_hz
        planes = None  # for sounds of another sample format or rate
        placed, at = np.zeros(round(seconds * source_hz), np.float32), None
        for frame in self.container.decode(self.stream):
            if frame.time is not None:
                begin = round((frame.time - self.origin_s - start_s) * source_hz)
            elif at is not None:
                begin = at
            elif sought:
                return None
            else:
                begin = round(-start_s * source_hz)
            if at is None and sought and begin > 0 and begin / source_hz + start_s > self.first_s + 0.05:
                return None
            # time stamps of some containers are rounded to milliseconds: small steps are not gaps
            at = begin if at is None or abs(begin - at) > 0.02 * source_hz else at
            if at >= len(placed):
                return placed
            if at + frame.samples <= 0:  # still warming up
                at += frame.samples
                continue
            plain = frame.format.name == "fltp" and frame.sample_rate == source_hz
            if not plain and planes is None:
                planes = av.AudioResampler(format="fltp", rate=source_hz)
            for part in (frame,) if plain else planes.resample(frame):
                channels = [np.frombuffer(plane, np.float32, part.samples) for plane in part.planes]  # n each
                paste(np.mean(channels, 0) if len(channels) > 1 else channels[0], placed, at)
                at += part.samples
        if (at is None or at <= 0) and start_s + seconds < self.promised_s:
            raise MediaError("the file is cut off")
        return placed

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close_picture(self):
        """No more frames are wanted. decord's thread decodes ahead as long as its reader is there: a sixth of a sample's work."""
        self.reader = None

    def close(self):
        if self.container is not None:
            self.container.close()
        self.container = self.reader = self.stream = None


class MediaInMemory(Media):
    """A file that was decoded whole and closed: the frames and the sound that Media gives, without decoding.

    It holds H·W·3 bytes a frame and 4 a sample of mono sound at the file's own rate. Frames are the same bits. So is sound, but
    where two readings of Media that begin at different places differ, too: Matroska rounds time stamps to milliseconds, and AAC
    with noise substitution (many encoders' default, not the toy's) leaves noise to the decoder, who makes it up anew, as loud.
    Raises MediaError where a file cannot be decoded to its end.
    """

    def __init__(self, path, modalities=MODALITIES, start_s=0.0, end_s=np.inf):
        super().__init__(path, modalities, start_s, end_s)
        with self, faults("cannot be decoded"):  # and close it
            if "video" in modalities:
                self.images = super().frames(self.frame_starts)  # N×H×W×3
            if "audio" in modalities:
                super()._decode(self.promised_s - 0.1, 0.05)  # is the end there?
                seconds = (
                    max(self.promised_s, (self.container.duration or 0) / av.time_base)
                    - self.sound_first_s
                    + 1.0
                )
                self.samples = np.trim_zeros(
                    super()._decode(self.sound_first_s, seconds), "b"
                )  # silence follows anyway

    def frames(self, times_s):
        return self.images[self.shown(times_s)]

    def _decode(self, start_s, seconds):
        placed = np.zeros(round(seconds * self.source_hz), np.float32)
        paste(self.samples, placed, round((self.sound_first_s - start_s) * self.source_hz))
        return placed


@functools.cache
def in_memory(path, modalities=MODALITIES, start_s=0.0, end_s=np.inf):
    """The MediaInMemory of a file, decoded once a process and kept; None where the file cannot be decoded whole."""
    try:
        return MediaInMemory(path, modalities, start_s, end_s)
    except MediaError:
        return None


def paste(samples, placed, at):
    """Copy samples (n) into placed (N) from its index `at` on, which may be negative; what reaches past its ends is left out."""
    left, right = max(at, 0), min(at + len(samples), len(placed))
    if right > left:
        placed[left:right] = samples[left - at : right - at]


@contextlib.contextmanager
def faults(what):
    """A decoder may say no in any way: every exception becomes a MediaError; the caller names and counts the file."""
    try:
        yield
    except MediaError:
        raise
    except Exception as error:
        raise MediaError(f"{what}: {_reason(error)}") from error


def _reason(error):
    """The decoder's complaint in one line, without the file's name, which the caller gives, and the place in its source."""
    if isinstance(error, (OSError, av.FFmpegError)) and error.strerror:
        return error.strerror
    lines = [re.sub(r"\[([\d:]+|/.*?)\] (\S+:\d+: )?", "", line).strip() for line in str(error).splitlines()]
    return f"{type(error).__name__}: {next(filter(None, lines), 'no reason given')[-200:]}"


def _upright(frame):
    """A PyAV frame as an image H×W×3 uint8, turned as the file asks; decord does so itself."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


def frame_times(reader):
    """When each frame of a decord reader is first shown, seconds from the first (N,); None where the file does not say."""
    times = reader.get_frame_timestamp(np.arange(len(reader)))[:, 0].astype(float)
    if not np.isfinite(times).all() or abs(times[0]) > 1e6 or (np.diff(times) < 0).any():
        return None
    return times - times[0]


def decord_finds_frames(container, stream):
    """Whether decord's frame k is the file's frame k.

    It seeks a key frame and counts from there. So it miscounts where the container has no index, and where frames shown
    before a key frame are stored after it (an open group of pictures: some are dropped). HEVC it decodes at times not at all, and of
    some narrow pictures (16, 24, 32, 48, 96, 144 pixels) it takes the padding of the rows for channels.
    """
    padded = -(-stream.width // 64) * 64
    if padded != stream.width and 3 * padded % stream.width == 0:
        return False
    if container.format.name in ("mpegts", "mpeg", "flv") or stream.codec_context.name == "hevc":
        return False
    key_pts = None
    if stream.codec_context.has_b_frames:
        for packet in itertools.islice(
            container.demux(stream), 300
        ):  # encoders start a group every 250 frames or sooner
            if packet.is_keyframe:
                key_pts = packet.pts
            elif None not in (packet.pts, key_pts) and packet.pts < key_pts:
                return False
    return True


@functools.lru_cache(maxsize=16)
def resampler(source_hz, rate_hz):
    """Usual rates are simple fractions of each other. A filter for others (44101 Hz) would take gigabytes: they are off by 1e-6."""
    ratio = Fraction(source_hz, rate_hz).limit_denominator(1000)
    return torchaudio.transforms.Resample(*ratio.as_integer_ratio()) if ratio != 1 else torch.nn.Identity()
