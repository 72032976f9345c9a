"""Distorted copies of a clip, to look for their original: fingerprinting (docs/method.md section 10).

In: a clip's picture, uint8 3×T×S×S, or its sound, float32 N in −1 … 1, and a strength.
Out: the same shape, type and times, distorted. Every random choice comes from the numpy Generator.

Speed is not here: it decides which frames and samples are taken, so it belongs to where clips are taken
(temporal_tasks.Clip.speed).
"""

import io
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
import torch
import torchaudio.functional as AF
import torchvision.transforms.v2.functional as TF
from av.video.reformatter import VideoReformatter

MP3_RATES_HZ = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)


# ---------------------------------------------------------------------------------------------------- picture
# video: uint8 3×T×S×S; the same distortion for all frames


def crop(video, side, rng):
    """A square anywhere in the picture, `side` of its side long (0 to 1), enlarged to the whole."""
    size = video.shape[-1]
    kept = max(round(side * size), 1)
    top, left = rng.integers(size - kept + 1, size=2)
    return _per_frame(TF.resized_crop, video, int(top), int(left), kept, kept, [size, size], antialias=True)


def blur(video, sigma, rng):
    """Gaussian blur with a standard deviation of `sigma` picture sides."""
    sigma_px = sigma * video.shape[-1]
    return _per_frame(TF.gaussian_blur, video, 2 * int(np.ceil(3 * sigma_px)) + 1, sigma_px)


def h264(video, crf, rng):
    """Encoded by H.264 at the constant rate factor `crf` (0 to 51, larger is worse), decoded again."""
    odd = [(0, 0), (0, video.shape[2] % 2), (0, video.shape[3] % 2), (0, 0)]  # colour has half the resolution
    frames = np.pad(video.permute(1, 2, 3, 0).numpy(), odd, "edge")  # T×H×W×3
    encoder, decoder = av.CodecContext.create("libx264", "w"), av.CodecContext.create("h264", "r")
    encoder.height, encoder.width = frames.shape[1:3]
    encoder.pix_fmt, encoder.time_base = "yuv420p", Fraction(1, 16)
    encoder.options = {"crf": str(crf), "mbtree": "0"}
    encoder.thread_count = decoder.thread_count = 1
    packets = []
    for k, image in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
        frame.pts = k
        packets += encoder.encode(frame)
    packets += [*encoder.encode(None), None]
    decoded = [frame for packet in packets for frame in decoder.decode(packet)]
    convert = VideoReformatter().reformat  # one for all frames takes a seventh of the time
    frames = np.stack(
        [convert(frame, format="rgb24", threads=1).to_ndarray() for frame in decoded]
    )  # T×S×S×3
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[..., : video.shape[2], : video.shape[3]].contiguous()


def overlay(video, area, rng):
    """A box with letter-like marks, 3 times as wide as high, over `area` of the picture (0 to 1/3)."""
    size = video.shape[-1]
    height, width = round(size * (area / 3) ** 0.5), round(size * (area * 3) ** 0.5)
    marks = torch.from_numpy(rng.random((1, 5, 15)) < 0.5).float()
    marks = TF.resize(marks, [height, width], TF.InterpolationMode.NEAREST).bool()  # 1×H×W
    paper, ink = torch.from_numpy(rng.integers(256, size=(2, 3, 1, 1, 1), dtype=np.uint8))
    top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
    video = video.clone()
    video[:, :, top : top + height, left : left + width] = torch.where(marks, ink, paper)  # 3×T×H×W
    return video


def flip(video, axes, rng):
    """Mirrored: axes 1: left and right, 2: top and bottom, 3: both."""
    return video.flip({1: [-1], 2: [-2], 3: [-1, -2]}[axes])


def rotation(video, degrees, rng):
    """Turned by `degrees` about the centre, either way; black where there is no picture."""
    return _per_frame(TF.rotate, video, degrees * float(rng.choice([-1, 1])), TF.InterpolationMode.BILINEAR)


def _per_frame(function, video, *arguments, **options):
    """The function of T×3×S×S on a video 3×T×S×S."""
    return function(video.transpose(0, 1), *arguments, **options).transpose(0, 1).contiguous()


# ------------------------------------------------------------------------------------------------------ sound
# wave: float32 N at rate_hz, −1 … 1


def noise(wave, rate_hz, snr_db, rng):
    """White noise, `snr_db` dB below the sound's power; none where the sound is silent."""
    white = torch.from_numpy(rng.standard_normal(len(wave), np.float32))
    return AF.add_noise(wave, white, torch.tensor(float(snr_db)))


def low_pass(wave, rate_hz, cutoff_hz, rng):
    """Frequencies above `cutoff_hz` are taken away, 24 dB an octave."""
    return _both_ways(AF.lowpass_biquad, wave, rate_hz, cutoff_hz)


def high_pass(wave, rate_hz, cutoff_hz, rng):
    """Frequencies below `cutoff_hz` are taken away, 24 dB an octave."""
    return _both_ways(AF.highpass_biquad, wave, rate_hz, cutoff_hz)


def _both_ways(biquad, wave, rate_hz, cutoff_hz):
    """Filtered forwards and backwards: nothing is delayed. ValueError where rate_hz is too low for it."""
    if cutoff_hz >= rate_hz / 2:
        raise ValueError(
            f"a cutoff of {cutoff_hz} Hz needs a sample rate above {2 * cutoff_hz} Hz, not {rate_hz} Hz"
        )
    return biquad(biquad(wave, rate_hz, cutoff_hz).flip(0), rate_hz, cutoff_hz).flip(0)


def mp3(wave, rate_hz, kbit_per_s, rng):
    """Encoded by MP3 at `kbit_per_s` (at least 32 where rate_hz is 32000 or more) and decoded again.

    Raises ValueError for a rate that MP3 has not.
    """
    if rate_hz not in MP3_RATES_HZ:
        raise ValueError(f"MP3 has no sample rate of {rate_hz} Hz, only {', '.join(map(str, MP3_RATES_HZ))}")
    if rate_hz >= 32000 and kbit_per_s < 32:  # the encoder would take 32
        raise ValueError(f"MP3 has no bit rate of {kbit_per_s} kbit/s at {rate_hz} Hz, only 32 and more")
    file = io.BytesIO()
    with av.open(file, "w", format="mp3") as out:
        stream = out.add_stream("libmp3lame", rate=rate_hz, layout="mono")
        stream.bit_rate = round(1000 * kbit_per_s)
        frame = av.AudioFrame.from_ndarray(wave[None].numpy(), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = rate_hz, 0
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    file.seek(0)
    # the header says how much the codec has put before the sound; the decoder leaves it out
    with av.open(file) as source:
        decoded = np.concatenate([frame.to_ndarray()[0] for frame in source.decode(audio=0)])
    return torch.from_numpy(decoded[: len(wave)])


def gain(wave, rate_hz, gain_db, rng):
    """Quieter by −`gain_db` dB, or louder."""
    return AF.gain(wave, float(gain_db))


def clipping(wave, rate_hz, share, rng):
    """Cut off at the level that `share` of the samples (0 to 1) exceed; where the others are silence, that
    share of those that sound, as nothing would be left."""
    level = wave.abs().quantile(1 - share)
    if not level and wave.any():
        level = wave[wave != 0].abs().quantile(1 - share)
    return wave.clamp(-level, level)


class Distortion(NamedTuple):
    """distort(video, strength, rng) of a picture, distort(wave, rate_hz, strength, rng) of a sound."""

    modality: str  # video or audio
    strengths: tuple  # from weak to strong
    unit: str  # what a strength says
    distort: Callable


DISTORTIONS = {
    "crop": Distortion("video", (0.9, 0.7, 0.5), "side that is left, share", crop),
    "blur": Distortion("video", (0.01, 0.02, 0.04), "standard deviation, picture sides", blur),
    "h264": Distortion("video", (30, 38, 46), "constant rate factor", h264),
    "overlay": Distortion("video", (0.05, 0.15, 0.3), "area, share", overlay),
    "flip": Distortion("video", (1, 2, 3), "1: left-right, 2: top-bottom, 3: both", flip),
    "rotation": Distortion("video", (5, 15, 30), "degrees", rotation),
    "noise": Distortion("audio", (20, 10, 0), "signal-to-noise ratio, dB", noise),
    "low_pass": Distortion("audio", (4000, 2000, 1000), "cutoff, Hz", low_pass),
    "high_pass": Distortion("audio", (250, 500, 1000), "cutoff, Hz", high_pass),
    "mp3": Distortion("audio", (32, 16, 8), "bit rate, kbit/s", mp3),
    "gain": Distortion("audio", (-6, -12, -24), "gain, dB", gain),
    "clipping": Distortion("audio", (0.05, 0.2, 0.5), "samples that are cut off, share", clipping),
}
