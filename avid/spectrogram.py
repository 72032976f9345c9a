"""Sound as an image: log-mel, linear bins, or the spectrogram of AVID's released networks.

In: an open file (media.Media), or waveforms, and config.Audio.
Out: decibels, columns × bands.
"""

import functools

import torch
import torchaudio

QUIETEST = 1e-10  # power of -100 dB: what silence becomes
RANGE_DB = 100.0  # AVID: nothing is further below a clip's loudest [A]


# constants are on the device, there to stay: to copy them at each step would wait for all that it has to do
@functools.lru_cache(maxsize=4)
def hann(n, dtype, device):
    """A Hann window of n samples, and its energy."""
    with torch.inference_mode(False):
        window = torch.hann_window(n, dtype=dtype)
        return window.to(device), window.square().sum().to(device)


@functools.lru_cache(maxsize=2)
def mel_filters(rate_hz, n_fft, mels, device):
    with torch.inference_mode(False):
        filters = torchaudio.functional.melscale_fbanks(n_fft // 2 + 1, 0.0, rate_hz / 2, mels, rate_hz)
        return filters.to(device, torch.float32)  # bins×mels


def columns(audio):
    """F, the number of spectrogram columns of a sound clip."""
    return round(audio.seconds * audio.frames_per_s)


def edge_s(audio):
    """How far the windows of a clip reach past its ends, s. AVID's do not: the clip is mirrored there."""
    return 0.0 if audio.frontend == "avid" else audio.n_fft / 2 / audio.rate_hz


def spectrogram(media, start_s, audio, speed=1, distort=None):
    """Log spectrogram of the sound from start_s on, dB: 1×F×bands, float32; `audio`: config.Audio.

    Column k is centred on start_s + (k + ½)·speed / frames_per_s, AVID's on start_s + k·speed / frames_per_s.
    At speed s the hop is s times longer, the window and so the pitch are the same (docs/method.md section 6).
    distort: what is done to the sound before, float32 N → N.
    """
    from_s, samples, hop = stretch(start_s, audio, speed)
    waveform = torch.from_numpy(media.sound(from_s, samples, audio.rate_hz))
    if distort:
        waveform = distort(waveform)
    return image(waveform, audio, hop)[None]  # 1×F×bands


def stretch(start_s, audio, speed=1):
    """The sound of a spectrogram from start_s on: from when, s, how many samples, and samples a column."""
    hop = hop_of(audio, speed)
    if audio.frontend == "avid":
        return start_s, columns(audio) * hop, hop
    return start_s + (hop - audio.n_fft) / 2 / audio.rate_hz, (columns(audio) - 1) * hop + audio.n_fft, hop


def hop_of(audio, speed=1):
    """Samples from one column to the next."""
    return round(audio.rate_hz // audio.frames_per_s * speed)


def image(waveform, audio, hop):
    """The spectrogram that audio.frontend names: …×N → …×F×bands, dB, on the waveform's device."""
    return (avid_image if audio.frontend == "avid" else log_image)(waveform, audio, hop)


def log_image(waveform, audio, hop):
    """Log-mel, or the linear bins where audio.mels = 0, of the power in a Hann window of unit energy: …×N →
    …×F×bands, dB.

    N = (F − 1)·hop + n_fft: the first window begins with the waveform, and the last one ends with it.
    """
    window, energy = hann(audio.n_fft, torch.float32, waveform.device)
    spectrum = torch.stft(waveform, audio.n_fft, hop, window=window, center=False, return_complex=True).mT
    squares = torch.view_as_real(spectrum).square_()  # …×F×257×2, in place of the spectrum
    power = (squares[..., 0] + squares[..., 1]).div_(energy)  # …×F×257
    if audio.mels:
        power = power @ mel_filters(audio.rate_hz, audio.n_fft, audio.mels, waveform.device)
    return 10 * torch.log10(power + QUIETEST)  # …×F×bands


def avid_image(waveform, audio, hop):
    """AVID's spectrogram [A]: …×N → …×F×(n_fft/2 + 1), dB, N = F·hop.

    A Hann window of 2·n_fft samples about every hop-th sample, the waveform mirrored at its ends; power, not
    divided by the window's energy; the first bin as it is, the others averaged in pairs; nothing further than
    100 dB below the loudest of the clip. The transform is in float64: in float32 quiet bins are rounding
    errors of loud ones.
    """
    window, _ = hann(2 * audio.n_fft, torch.float64, waveform.device)
    spectrum = torch.stft(waveform.double(), 2 * audio.n_fft, hop, window=window, return_complex=True)
    spectrum = spectrum[..., :-1].to(torch.complex64).mT  # …×F×513: the last column is the next clip's
    power = spectrum.real.square() + spectrum.imag.square()
    power = torch.cat([power[..., :1], (power[..., 1::2] + power[..., 2::2]) / 2], -1)  # …×F×257
    level = 10 * power.clamp(min=QUIETEST).log10()
    return level.maximum(level.amax((-2, -1), keepdim=True) - RANGE_DB)
