"""Files kept in memory equal those on disk, and spectrograms show the requested times and the right
pitches.
"""

import numpy as np
import pytest
import torch
from conftest import CHIRP_S, chirp, chirp_time, chirps, numbered, numbers, tone

from avid import config, media, toy
from avid.media import Media, MediaError, MediaInMemory, in_memory
from avid.spectrogram import avid_image, columns, edge_s, log_image, spectrogram

MS = 1e-3
TWO_SECONDS = np.arange(50) / 25  # 25 frames a second
OPEN_GROUPS = {"x264-params": "open-gop=1:bframes=3:keyint=24:min-keyint=24:scenecut=0"}


# -------------------------------------------------------------------------------------------------- in memory


@pytest.mark.parametrize(
    ("name", "codecs", "options"),
    [
        ("a.mp4", ("libx264", "aac"), {}),
        ("late.mp4", ("libx264", "flac"), {"sound_from_s": 0.3, "strict": "-2"}),
        ("gap.mp4", ("libx264", "flac"), {"gap_s": (0.8, 1.2), "strict": "-2"}),
        ("open.mp4", ("libx264", "aac"), {"encoder": OPEN_GROUPS}),
        ("a.avi", ("mpeg4", "pcm_s16le"), {}),
        ("a.mkv", ("libx264", "aac"), {}),
        ("a.ts", ("libx264", "aac"), {}),
        ("a.wav", ("", "pcm_s16le"), {}),
        ("a.flac", ("", "flac"), {}),
        ("a.mp3", ("", "libmp3lame"), {}),
        ("a.ogg", ("", "libopus"), {}),
    ],
)
def test_a_file_in_memory_equals_the_file_on_disk(media_file, name, codecs, options):
    """Frames bit for bit; sound too, unless the decoder adds noise or time stamps are rounded."""
    picture = {"frame_s": TWO_SECONDS} if codecs[0] else {}
    wave = 0.3 * tone(400, 2.0, 44100) + chirps([0.1, 0.9, 1.7], 2.0, 44100)
    rate_hz = 48000 if name == "a.ogg" else 44100
    path = media_file(name, wave=wave, rate_hz=rate_hz, codecs=codecs, **picture, **options)
    modalities = ("video", "audio") if picture else ("audio",)
    kept = MediaInMemory(path, modalities)
    assert kept.container is None
    assert kept.reader is None
    rng = np.random.default_rng(0)
    for start_s in rng.uniform(-0.1, 2.1, 20):
        media = Media(path, modalities)
        assert (kept.first_s, kept.last_s) == (media.first_s, media.last_s)
        sound, expected = (m.sound(start_s, 8000, 16000) for m in (kept, media))
        if name in ("a.mkv", "a.ts"):
            both = np.abs(np.fft.rfft(sound)), np.abs(np.fft.rfft(expected))
            np.testing.assert_allclose(*both, atol=0.05 * both[1].max())
        elif codecs[1] in ("aac", "libmp3lame", "libopus"):
            np.testing.assert_allclose(sound, expected, atol=1e-3)
        else:
            np.testing.assert_array_equal(sound, expected)
        if picture:
            times = rng.uniform(-0.1, 2.1, 5)
            np.testing.assert_array_equal(kept.frames(times), media.frames(times))


def test_a_toy_file_in_memory_is_the_same_bits(tmp_path):
    """The decoder adds no noise to what the toy's encoder writes."""
    path, rng, settings = tmp_path / "a.mp4", np.random.default_rng(0), config.Toy(seconds=4.0)
    toy.encode(path, numbered(range(64)), rng.normal(0, 0.2, 64000).astype(np.float32), settings)
    kept = MediaInMemory(path)
    for start_s in rng.uniform(-0.1, 4.1, 30):
        np.testing.assert_array_equal(
            kept.sound(start_s, 8000, 16000), Media(path).sound(start_s, 8000, 16000)
        )


def test_a_file_is_decoded_once(media_file):
    path = media_file("a.mp4", frame_s=TWO_SECONDS, wave=tone(600, 2.0, 48000))
    kept = in_memory(path, start_s=0.5, end_s=1.5)
    assert (kept.first_s, kept.last_s) == (0.5, 1.5)
    path.unlink()
    assert in_memory(path, start_s=0.5, end_s=1.5) is kept
    assert numbers(kept.frames([0.5 + MS])) == [12]


def test_parts_of_a_file_in_memory_share_one_decoding(media_file, monkeypatch):
    """data.in_memory with a list of intervals: one decoding, and each part keeps its bounds and clock."""
    path = media_file("a.mp4", frame_s=TWO_SECONDS, wave=tone(600, 2.0, 48000))
    opened, plain = [], media.av.open
    monkeypatch.setattr(media.av, "open", lambda *a, **k: (opened.append(a), plain(*a, **k))[1])
    parts = [in_memory(path, ("video", "audio"), *part) for part in ((0.25, 0.75), (1.0, 1.5), (0.0, np.inf))]
    assert len(opened) == 1
    assert [(part.first_s, part.last_s) for part in parts[:2]] == [(0.25, 0.75), (1.0, 1.5)]
    assert parts[2].first_s == 0.0 and parts[2].last_s > 1.9
    for part in parts:
        np.testing.assert_array_equal(part.frames([0.3, 1.2]), Media(path).frames([0.3, 1.2]))
    with pytest.raises(MediaError, match="do not overlap"):
        in_memory(path, ("video", "audio"), 5.0, 6.0)


def test_a_file_that_is_cut_off_is_not_kept(media_file, tmp_path):
    """Media still reads the part that is there."""
    whole = media_file(
        "a.mp4", frame_s=TWO_SECONDS, wave=tone(600, 2.0, 48000), movflags="faststart"
    ).read_bytes()
    for modalities in (("video", "audio"), ("audio",)):
        cut = tmp_path / f"cut{len(modalities)}.mp4"
        cut.write_bytes(whole[: len(whole) * 6 // 10])
        assert np.abs(Media(cut, modalities).sound(0.2, 4000, 16000)).max() > 0.4
        assert in_memory(cut, modalities) is None


# ------------------------------------------------------------------------------------------------ spectrogram


def test_a_spectrogram_equals_a_written_out_fourier_transform(media_file):
    """Every column is 10·log10 of the power in a Hann window of unit energy."""
    rng = np.random.default_rng(0)
    media = Media(
        media_file(
            "a.wav",
            wave=rng.uniform(-0.5, 0.5, (1, 24000)).astype(np.float32),
            rate_hz=16000,
            codecs=("", "pcm_s16le"),
        ),
        ("audio",),
    )
    audio = config.Audio(seconds=0.5, rate_hz=16000, frames_per_s=50, n_fft=256, mels=0)
    image = spectrogram(media, 0.3, audio).numpy()
    assert columns(audio) == 25
    assert image.shape == (1, 25, 129)
    assert image.dtype == np.float32
    wave = media.sound(0.0, 24000, 16000).astype(float)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256)
    for k in range(25):
        middle = round((0.3 + (k + 0.5) / 50) * 16000)
        power = np.abs(np.fft.rfft(wave[middle - 128 : middle + 128] * window)) ** 2 / (window**2).sum()
        np.testing.assert_allclose(image[0, k], 10 * np.log10(power + 1e-10), atol=0.05)


@pytest.mark.parametrize("speed", [1, 2, 4, 8])
def test_column_k_is_centred_on_its_time(media_file, speed):
    """A click falls into the column whose time is nearest, at every speed: columns are speed times further
    apart."""
    audio = config.Audio(seconds=1.0, rate_hz=16000, frames_per_s=100, n_fft=512, mels=0)
    start_s, asked = 0.5, (5, 37, 80)
    at_s = [start_s + (k + 0.5) * speed / 100 for k in asked]
    wave = np.zeros((1, 10 * 16000), np.float32)
    for time_s in at_s:
        wave[0, round(time_s * 16000)] = 0.9
    media = Media(media_file("a.wav", wave=wave, rate_hz=16000, codecs=("", "pcm_s16le")), ("audio",))
    image = spectrogram(media, start_s, audio, speed)
    assert image.shape == (1, 100, 257)
    loudness = image[0].mean(1)
    peaks = [
        k for k in range(1, 99) if loudness[k] >= max(loudness[k - 1], loudness[k + 1]) and loudness[k] > -70
    ]
    assert peaks == list(asked)


@pytest.mark.parametrize("mels", [0, 64])
def test_speed_keeps_the_pitch(media_file, mels):
    media = Media(
        media_file("a.wav", wave=tone(1000, 10.0, 16000), rate_hz=16000, codecs=("", "pcm_s16le")), ("audio",)
    )
    audio = config.Audio(seconds=1.0, rate_hz=16000, frames_per_s=100, n_fft=512, mels=mels)
    slow, fast = (spectrogram(media, 0.5, audio, speed) for speed in (1, 8))
    assert slow.shape == fast.shape == (1, 100, mels or 257)
    assert set(slow[0].argmax(1).tolist()) == set(fast[0].argmax(1).tolist())
    # 1000 Hz / (16000 Hz / 512)
    assert slow[0, 0].argmax() == (32 if mels == 0 else slow[0].mean(0).argmax())
    np.testing.assert_allclose(slow[0].max(1).values, fast[0].max(1).values, atol=0.5)


def test_silence_is_the_lowest_level(media_file):
    media = Media(
        media_file("a.wav", wave=chirps([], 2.0, 16000), rate_hz=16000, codecs=("", "pcm_s16le")), ("audio",)
    )
    image = spectrogram(media, 0.5, config.Audio(seconds=0.5, rate_hz=16000))
    np.testing.assert_allclose(image, -100.0, atol=1e-3)


def test_a_chirp_is_found_where_it_was_put():
    """The other tests measure times with it."""
    wave = chirps([0.2], 1.0, 16000)[0]
    assert chirp_time(wave, 16000) == 0.2
    assert len(chirp(16000)) == round(CHIRP_S * 16000)


# ----------------------------------------------------------------------------------------- AVID's spectrogram

AVID = config.Audio(frontend="avid")  # 2 s at 24 kHz, 100 columns a second


def avid_reference(wave, hop=240, window=1024, range_db=100.0):
    """As docs/method.md section 12 describes it, column by column in float64: N → N / hop × 513 → 257 bins,
    dB.

    The power in a Hann window of 1,024 samples about each column's time, the sound mirrored at its ends; the
    first bin stays alone, the other 512 are averaged in pairs; dB; nothing further than 100 dB below the
    loudest.
    """
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    mirrored = np.pad(np.asarray(wave, np.float64), window // 2, mode="reflect")
    image = []
    for k in range(len(wave) // hop):
        spectrum = np.fft.rfft(mirrored[k * hop : k * hop + window] * hann)
        power = spectrum.real**2 + spectrum.imag**2
        bins = [power[0], *((power[b] + power[b + 1]) / 2 for b in range(1, window // 2, 2))]
        image.append(10 * np.log10(np.maximum(bins, 1e-10)))
    return np.maximum(image, np.max(image) - range_db)


def synthetic_sounds():
    """Noise, a sweep that ends in silence, and a loud tone beside a very quiet one."""
    rng, t = np.random.default_rng(0), np.arange(48000) / 24000
    yield rng.normal(0, 0.1, 48000)
    yield np.where(t < 1.5, 0.5 * np.sin(2 * np.pi * 2000 * t**2), 0.0)
    yield 0.9 * np.sin(2 * np.pi * 440 * t) + 1e-5 * np.sin(2 * np.pi * 7000 * t)


def test_avids_spectrogram_equals_the_description():
    for wave in synthetic_sounds():
        wave = torch.from_numpy(wave.astype(np.float32))
        image = avid_image(wave, AVID, hop=240)
        assert image.shape == (200, 257)
        np.testing.assert_allclose(image, avid_reference(wave.numpy()), rtol=0, atol=1e-4)


class Recorded:
    """A file that keeps the sound it returned, because some decoders add other noise at each reading."""

    def __init__(self, media):
        self.media = media

    def sound(self, *asked):
        self.asked, self.wave = asked, self.media.sound(*asked)
        return self.wave


def test_avids_spectrogram_equals_the_description_on_real_sounds(real_data):
    """Equal within 1e-4 dB to the reference, on sounds of all kinds."""
    sounds = sorted((real_data / "esc10" / "audio").glob("*.ogg"))[::40]
    videos = sorted((real_data / "vggsound" / "clips").iterdir())[::20]
    films = [real_data / "media" / name for name in ("nasa_13013.mp4", "flipping_a_pancake.mkv")]
    checked = 0
    for path in [*sounds, *videos, *films]:
        with Media(path, ("audio",)) as media:
            start_s = media.first_s + 0.25 * (media.last_s - media.first_s - AVID.seconds)
            recorded = Recorded(media)
            image = spectrogram(recorded, start_s, AVID)[0]
        assert recorded.asked == (start_s, 48000, 24000)
        np.testing.assert_allclose(image, avid_reference(recorded.wave), rtol=0, atol=1e-4, err_msg=path.name)
        checked += 1
    assert checked >= 10


def test_the_log_spectrogram_does_not_replace_avids():
    """A released checkpoint needs AVID's spectrogram: the other one, with a window of 512, correlates weakly
    with it.
    """
    wave = torch.from_numpy(next(synthetic_sounds()).astype(np.float32))
    audio = config.Audio(mels=0)
    image = log_image(wave, audio, 240)
    avids = avid_image(wave, AVID, 240)[: len(image)]
    assert np.corrcoef(image.flatten(), avids.flatten())[0, 1] < 0.9


@pytest.mark.parametrize("speed", [1, 4])
def test_avids_column_k_is_centred_on_its_time(media_file, speed):
    audio = config.Audio(frontend="avid", seconds=1.0, rate_hz=16000)
    start_s, asked = 0.5, (5, 37, 80)
    wave = np.zeros((1, 6 * 16000), np.float32)
    for k in asked:
        wave[0, round((start_s + k * speed / 100) * 16000)] = 0.9
    media = Media(media_file("a.wav", wave=wave, rate_hz=16000, codecs=("", "pcm_s16le")), ("audio",))
    image = spectrogram(media, start_s, audio, speed)
    assert image.shape == (1, 100, 257)
    loudness = image[0].mean(1)
    loudest = loudness.max()
    peaks = [
        k
        for k in range(1, 99)
        if loudness[k] >= max(loudness[k - 1], loudness[k + 1]) and loudness[k] > loudest - 1
    ]
    assert peaks == list(asked)


def test_avids_clips_reach_to_the_ends_of_the_sound(media_file):
    """The clip is mirrored where a window would reach past it: nothing is lost at the ends of a file."""
    media = Media(
        media_file("a.wav", wave=tone(1000, 2.0, 24000), rate_hz=24000, codecs=("", "pcm_s16le")), ("audio",)
    )
    image = spectrogram(media, media.first_s, AVID)[0]
    assert edge_s(AVID) == 0
    assert edge_s(config.Audio()) == 256 / 24000
    # 1000 Hz / (24000 Hz / 1024) = 42.7: bins 42 and 43 of 513
    assert set(image.argmax(1).tolist()) <= {21, 22}
    assert image.max(1).values.min() > image.max() - 6  # the first and the last column, too


def test_a_batch_of_waveforms_gives_the_same_spectrograms():
    waves = torch.stack([torch.from_numpy(wave.astype(np.float32)) for wave in synthetic_sounds()])
    for image, audio in ((avid_image, AVID), (log_image, config.Audio())):
        alone = torch.stack([image(wave, audio, 240) for wave in waves])
        torch.testing.assert_close(image(waves, audio, 240), alone, rtol=0, atol=1e-4)
