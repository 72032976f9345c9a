"""Pictures and sound out of one file, by time.

In: a path. Frames come from decord, sound from PyAV, on one clock that begins with the file.
Out: frames shown at given times, mono sound of an interval, its log spectrogram.
"""

import functools

import av
import decord
import numpy as np
import torch
import torchaudio

MODALITIES = ("video", "audio")
QUIETEST = 1e-10  # power of -100 dB: what silence becomes


class MediaError(Exception):
    """A file that cannot be used, and why, in one line."""


class Media:
    """An open video file: frames by decord, sound by PyAV, on one clock that begins with the file.

    first_s and last_s bound the part where every wanted modality is present; start_s and end_s narrow it further.
    Raises MediaError where a wanted modality is missing or cannot be read.
    """

    def __init__(self, path, modalities=MODALITIES, start_s=0.0, end_s=np.inf):
        self.container = self.reader = None
        self.first_s, self.last_s = start_s, end_s
        try:
            video_start = 0.0
            if "audio" in modalities:
                self.container = av.open(str(path), metadata_errors="ignore")
                origin = (self.container.start_time or 0) / av.time_base
                self.stream = self.container.streams.best("audio")
                if self.stream is None:
                    raise MediaError("no sound")
                if self.stream.codec_context is None or not self.stream.rate:
                    raise MediaError("sound of an unknown codec or rate")
                self.stream.thread_count = 1
                self.origin = origin
                sound_start = self._seconds(self.stream.start_time) - origin
                length = self._seconds(self.stream.duration) or (self.container.duration or 0) / av.time_base
                self._usable(sound_start, sound_start + length)
                picture = self.container.streams.best("video")
                if picture is not None and picture.start_time is not None:
                    video_start = float(picture.start_time * picture.time_base) - origin
            if "video" in modalities:
                self.reader = decord.VideoReader(str(path), num_threads=1)
                self.frame_starts = video_start + frame_times(self.reader)
                self._usable(self.frame_starts[0], self.frame_starts[-1] + 1 / self.reader.get_avg_fps())
            if not self.last_s > self.first_s:
                raise MediaError("picture and sound, or the asked part, do not overlap in time")
        except MediaError:
            self.close()
            raise
        except Exception as error:  # a decoder may say no in any way; the caller names and counts the file
            self.close()
            raise MediaError(f"cannot be opened: {_reason(error)}") from error

    def _seconds(self, pts):
        return float(pts * self.stream.time_base) if pts is not None else 0.0

    def _usable(self, first_s, last_s):
        self.first_s, self.last_s = max(self.first_s, first_s), min(self.last_s, last_s)

    def frames(self, times_s):
        """The frames shown at these times (any order, repeats allowed): uint8 T×H×W×3. A file's last frame lasts."""
        shown = np.searchsorted(self.frame_starts, np.asarray(times_s) + 1e-6, side="right") - 1
        wanted, back = np.unique(shown.clip(0, len(self.frame_starts) - 1), return_inverse=True)
        try:
            return self.reader.get_batch(wanted).asnumpy()[back]
        except Exception as error:
            raise MediaError(f"picture cannot be decoded: {_reason(error)}") from error

    def sound(self, start_s, samples, rate_hz):
        """`samples` samples of mono sound at rate_hz from start_s on: float32; silence where the file has none."""
        margin_s = 0.01  # the resampler's reach
        seconds = samples / rate_hz
        try:
            source, source_hz = self._decode(start_s - margin_s, seconds + 2 * margin_s)
        except Exception as error:
            raise MediaError(f"sound cannot be decoded: {_reason(error)}") from error
        source = np.nan_to_num(source, nan=0.0, posinf=0.0, neginf=0.0)
        waveform = resampler(source_hz, rate_hz)(torch.from_numpy(source))
        skip = round(margin_s * rate_hz)
        return waveform[skip : skip + samples].numpy()

    def _decode(self, start_s, seconds):
        """The decoded sound of an interval at the file's own rate: placed by its time stamps, mixed to mono."""
        for seek_s in (start_s - 0.15, None):  # a decoder needs some packets to warm up; None: from the beginning
            if seek_s is None or seek_s > 0.0:
                target = 0.0 if seek_s is None else seek_s
                self.container.seek(int((target + self.origin) / self.stream.time_base), stream=self.stream)
            mono = av.AudioResampler(format="fltp", layout="mono")
            source_hz = self.stream.rate
            placed, at = np.zeros(round(seconds * source_hz), np.float32), None
            for frame in self.container.decode(self.stream):
                time_s = frame.time - self.origin if frame.time is not None else (at or 0) / source_hz + start_s
                if at is None and seek_s is not None and time_s > start_s and time_s > self.first_s + 0.05:
                    break  # the file's index led past the interval
                begin = round((time_s - start_s) * source_hz)
                # time stamps of some containers are rounded to milliseconds: small steps are not gaps
                at = begin if at is None or abs(begin - at) > 0.02 * source_hz else at
                if at >= len(placed):
                    return placed, source_hz
                for part in mono.resample(frame):
                    samples = part.to_ndarray()[0]
                    left, right = max(at, 0), min(at + len(samples), len(placed))
                    if right > left:
                        placed[left:right] = samples[left - at : right - at]
                    at += len(samples)
            else:
                return placed, source_hz
        return placed, source_hz

    def close(self):
        if self.container is not None:
            self.container.close()
        self.container = self.reader = None


def _reason(error):
    """The decoder's complaint in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][-200:] if lines else 'no reason given'}"


def frame_times(reader):
    """When each frame of a decord reader is first shown: N seconds from the first; by the frame rate where the file has no times."""
    number = np.arange(len(reader))
    times = reader.get_frame_timestamp(number)[:, 0]
    if not np.isfinite(times).all() or abs(times[0]) > 1e6 or (np.diff(times) < 0).any():
        return number / reader.get_avg_fps()
    return times - times[0]


@functools.lru_cache(maxsize=16)
def resampler(source_hz, rate_hz):
    return torchaudio.transforms.Resample(source_hz, rate_hz) if source_hz != rate_hz else torch.nn.Identity()


@functools.lru_cache(maxsize=1)
def mel_filters(rate_hz, n_fft, mels):
    return torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 0.0, rate_hz / 2, mels, rate_hz)  # bins×mels


def columns(audio):
    """F, the number of spectrogram columns of a sound clip."""
    return round(audio.seconds * audio.frames_per_s)


def spectrogram(media, start_s, audio, speed=1):
    """Log spectrogram of the sound from start_s on, dB: 1×F×bins, float32; `audio`: config.Audio.

    Column k is centred on start_s + (k + ½)·speed / frames_per_s: at speed s the hop is s times longer, the window and so the
    pitch are the same (docs/method.md section 6).
    """
    hop = audio.rate_hz // audio.frames_per_s * speed
    samples = (columns(audio) - 1) * hop + audio.n_fft
    waveform = torch.from_numpy(media.sound(start_s + (hop - audio.n_fft) / 2 / audio.rate_hz, samples, audio.rate_hz))
    window = torch.hann_window(audio.n_fft)
    power = torchaudio.functional.spectrogram(
        waveform, 0, window, audio.n_fft, hop, audio.n_fft, 2.0, normalized="window", center=False
    ).T  # F×257
    if audio.mels:
        power = power @ mel_filters(audio.rate_hz, audio.n_fft, audio.mels)
    return 10 * torch.log10(power + QUIETEST)[None]  # 1×F×bins
