"""Distorted copies keep shape, type and times, depend on the generator alone, and differ more with more
strength.
"""

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from conftest import chirp_time, chirps

from avid.media import Media
from avid.tools.distortions import DISTORTIONS, MP3_RATES_HZ

RATE_HZ = 24000
VIDEO = [name for name, distortion in DISTORTIONS.items() if distortion.modality == "video"]
AUDIO = [name for name, distortion in DISTORTIONS.items() if distortion.modality == "audio"]
EACH = [(name, strength) for name, distortion in DISTORTIONS.items() for strength in distortion.strengths]


def distort(name, clip, strength, seed=0, rate_hz=RATE_HZ):
    rng = np.random.default_rng(seed)
    video = DISTORTIONS[name].modality == "video"
    return DISTORTIONS[name].distort(*((clip, strength, rng) if video else (clip, rate_hz, strength, rng)))


@pytest.fixture
def video():
    """uint8 3×8×S×S: a smooth random pattern, different in each frame; S is odd."""
    noise = torch.rand(8, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    return (TF.resize(noise, [57, 57]) * 255).byte().transpose(0, 1).contiguous()


@pytest.fixture
def wave():
    """float32 N: chirps, so that a delay would show, over a hum and a hiss."""
    t = np.arange(2 * RATE_HZ) / RATE_HZ
    hiss = np.random.default_rng(1).standard_normal(len(t))
    return torch.from_numpy(
        (chirps([0.5, 1.1, 1.7], 2, RATE_HZ)[0] + 0.1 * np.sin(2 * np.pi * 100 * t) + 0.02 * hiss).astype(
            "f4"
        )
    )


def delay(a, b):
    """The number of samples by which b is later than a."""
    n = len(a) + len(b)
    match = np.fft.irfft(np.fft.rfft(b, n) * np.conj(np.fft.rfft(a, n)), n)
    return (int(match.argmax()) + n // 2) % n - n // 2


def test_the_distortions_are_those_of_the_protocol():
    assert VIDEO == "crop blur h264 overlay flip rotation".split()
    assert AUDIO == "noise low_pass high_pass mp3 gain clipping".split()
    assert all(len(distortion.strengths) == 3 and distortion.unit for distortion in DISTORTIONS.values())


@pytest.mark.parametrize("name, strength", EACH)
def test_a_copy_has_the_shape_of_its_original_and_is_reproducible(name, strength, video, wave):
    clip = video if name in VIDEO else wave
    before = clip.clone()
    copy = distort(name, clip, strength)
    assert copy.shape == clip.shape and copy.dtype == clip.dtype and copy.is_contiguous()
    assert torch.equal(clip, before) and not torch.equal(copy, clip)
    assert torch.equal(copy, distort(name, clip, strength))


@pytest.mark.parametrize("name", ["crop", "overlay", "rotation", "noise"])
def test_random_distortions_differ_between_seeds(name, video, wave):
    clip, strength = video if name in VIDEO else wave, DISTORTIONS[name].strengths[1]
    assert any(
        not torch.equal(distort(name, clip, strength), distort(name, clip, strength, seed))
        for seed in range(1, 6)
    )


@pytest.mark.parametrize("name", [name for name in DISTORTIONS if name not in ("crop", "flip")])
def test_a_larger_strength_changes_the_clip_more(name, video, wave):
    clip = video if name in VIDEO else wave
    away = [
        (distort(name, clip, strength).float() - clip.float()).square().mean()
        for strength in DISTORTIONS[name].strengths
    ]
    assert away[0] < away[1] < away[2]


# picture


@pytest.mark.parametrize(
    "name, strength", [(name, s) for name, s in EACH if name in ("blur", "h264", "overlay") or s in (5, 15)]
)
def test_every_frame_keeps_its_time(name, strength, video):
    copy = distort(name, video, strength).float()
    away = (copy[:, :, None] - video[:, None].float()).square().mean((0, 3, 4))  # T×T
    assert away.argmin(1).tolist() == list(range(8))


def test_compression_at_best_quality_is_almost_the_original(video):
    red = torch.tensor([200, 30, 60], dtype=torch.uint8)[:, None, None, None].expand(video.shape)
    for clip in (
        video[:1].expand(3, -1, -1, -1),
        red,
    ):  # no colour edges: H.264 halves the resolution of colour
        assert (distort("h264", clip, 0).float() - clip.float()).abs().mean() < 3


def test_a_crop_has_the_given_size_in_every_frame():
    ramp = torch.arange(100.0).expand(3, 4, 100, 100).byte()  # the value is the column
    for side in DISTORTIONS["crop"].strengths:
        copy = distort("crop", ramp, side).float()
        assert float(copy[..., -1].mean() - copy[..., 0].mean()) == pytest.approx(100 * side, abs=2)
        assert (copy == copy[:, :1]).all()


def test_a_blur_has_the_given_width():
    point = torch.zeros(3, 1, 101, 101, dtype=torch.uint8)
    point[..., 50, :] = 255  # a line: the blur keeps its total weight
    for sigma in DISTORTIONS["blur"].strengths[1:]:
        across = distort("blur", point, sigma)[0, 0, :, 50].double()
        width = (across * (torch.arange(101) - 50) ** 2).sum() / across.sum()
        assert float(width.sqrt()) == pytest.approx(101 * sigma, rel=0.1)


@pytest.mark.parametrize("area", DISTORTIONS["overlay"].strengths)
def test_an_overlay_covers_the_given_area_in_every_frame(area):
    grey = torch.full((3, 4, 112, 112), 127, dtype=torch.uint8)
    for seed in range(5):
        changed = (distort("overlay", grey, area, seed) != grey).any(0)  # T×S×S
        assert float(changed[0].float().mean()) == pytest.approx(area, rel=0.1)
        assert (changed == changed[:1]).all()


def test_flips_mirror(video):
    assert torch.equal(distort("flip", video, 1)[..., 0], video[..., -1])
    assert torch.equal(distort("flip", video, 2)[..., 0, :], video[..., -1, :])
    assert torch.equal(distort("flip", video, 3), torch.rot90(video, 2, (-2, -1)))


def test_a_rotation_turns_by_its_angle_in_either_direction():
    line = torch.zeros(3, 1, 101, 101, dtype=torch.uint8)
    line[..., 50, 50:] = 255  # from the centre to the right
    seen = set()
    for seed in range(8):
        y, x = np.nonzero(distort("rotation", line, 30, seed)[0, 0].numpy() > 100)
        seen.add(round(float(np.degrees(np.arctan2(50 - y.mean(), x.mean() - 50)))))
    assert seen == {-30, 30}


# sound


@pytest.mark.parametrize("name, strength", [pair for pair in EACH if pair[0] in AUDIO])
def test_no_sound_is_delayed(name, strength, wave):
    copy = distort(name, wave, strength)
    assert abs(delay(wave.numpy(), copy.numpy())) <= (0 if name != "mp3" else 1)
    assert chirp_time(copy[RATE_HZ:36000].numpy(), RATE_HZ) == pytest.approx(0.1, abs=0.001)


@pytest.mark.parametrize("name, strength", [pair for pair in EACH if pair[0] in AUDIO])
def test_silence_stays_silent(name, strength):
    assert distort(name, torch.zeros(RATE_HZ), strength).abs().max() < 1e-4


@pytest.mark.parametrize("snr_db", DISTORTIONS["noise"].strengths)
def test_noise_has_the_given_signal_to_noise_ratio(snr_db, wave):
    added = distort("noise", wave, snr_db) - wave
    assert 10 * float((wave.square().sum() / added.square().sum()).log10()) == pytest.approx(snr_db, abs=0.01)


@pytest.mark.parametrize("name, sign", [("low_pass", 1), ("high_pass", -1)])
def test_filters_remove_what_is_beyond_their_cutoff(name, sign):
    hiss = torch.from_numpy(0.1 * np.random.default_rng(0).standard_normal(10 * RATE_HZ).astype("f4"))
    for cutoff_hz in DISTORTIONS[name].strengths:
        # a bin is 0.1 Hz
        power = (torch.fft.rfft(distort(name, hiss, cutoff_hz)) / torch.fft.rfft(hiss)).abs().square()
        kept, half, gone = (
            10 * power[at - 200 : at + 200].mean().log10()
            for at in (int(10 * cutoff_hz * 2.0 ** (sign * k)) for k in (-2, 0, 1))
        )
        assert abs(kept) < 0.5 and abs(half + 6) < 0.5 and gone < -20


@pytest.mark.parametrize("rate_hz", MP3_RATES_HZ)
@pytest.mark.parametrize("samples", [1, 1151, 24001])
def test_mp3_returns_every_sample_at_every_rate(rate_hz, samples):
    wave = torch.from_numpy(chirps([0.0], 24001 / rate_hz, rate_hz)[0])[:samples]
    copy = distort("mp3", wave, 32, rate_hz=rate_hz)
    assert len(copy) == samples
    if samples > 24000:
        assert abs(delay(wave.numpy(), copy.numpy())) <= 1


def test_a_gain_is_in_decibels(wave):
    torch.testing.assert_close(distort("gain", wave, -20), wave / 10)


@pytest.mark.parametrize("share", DISTORTIONS["clipping"].strengths)
def test_clipping_cuts_the_given_share_and_nothing_else(share, wave):
    copy = distort("clipping", wave, share)
    cut = copy != wave
    assert float(cut.float().mean()) == pytest.approx(share, abs=0.001)
    assert torch.allclose(copy[cut].abs(), copy.abs().max())


def test_clipping_leaves_something_of_a_sound_that_is_mostly_silence(wave):
    padded = torch.cat([wave[:100], torch.zeros(4000)])
    copy = distort("clipping", padded, 0.4)
    cut = copy != padded
    assert float(cut[:100].float().mean()) == pytest.approx(0.4, abs=0.02) and not cut[100:].any()
    assert not distort("clipping", torch.zeros(100), 0.4).any()


def test_an_impossible_distortion_is_an_error(wave):
    with pytest.raises(ValueError, match="sample rate above 8000 Hz"):
        distort("low_pass", wave, 4000, rate_hz=8000)
    with pytest.raises(ValueError, match="MP3 has no sample rate of 96000 Hz"):
        distort("mp3", wave, 16, rate_hz=96000)


def test_a_real_clip_is_still_recognised(real_media):
    media = Media(real_media / "nasa_13013.mp4")
    frames = torch.from_numpy(media.frames(3 + np.arange(8) / 16)).permute(0, 3, 1, 2)
    video = TF.resized_crop(frames, 0, 100, 270, 270, [112, 112]).transpose(0, 1).contiguous()
    wave = torch.from_numpy(media.sound(3.0, 2 * RATE_HZ, RATE_HZ))
    for name, strength in EACH:
        if name in AUDIO:
            copy = distort(name, wave, strength)
            assert delay(wave.numpy(), copy.numpy()) == 0 and np.corrcoef(wave, copy)[0, 1] > 0.3
        elif name in ("blur", "h264"):
            assert np.corrcoef(video.flatten(), distort(name, video, strength).flatten())[0, 1] > 0.8
