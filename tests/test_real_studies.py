"""The studies of real clips, in their --quick form and on synthetic clips; and clips with swapped sounds."""

import contextlib
import csv
import shutil

import numpy as np
import pytest
import torch
from conftest import tone, write_media
from test_studies import bank_by_kind, world

from avid import config, losses, media
from studies import capacity, esc10, fingerprint, own, recipe, robust, runs, soft, speech, swapped

STUDIES = {
    s.name: s
    for s in (
        own.STUDY,
        recipe.STUDY,
        fingerprint.STUDY,
        speech.STUDY,
        esc10.STUDY,
        capacity.STUDY,
        soft.STUDY,
    )
}
CLIPS, SECONDS, RATE_HZ = 14, 6.0, 16000


def write_csv(path, head, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head, *rows])


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Clips that each have a tone of their own, with the lists that studies.own and studies.speech expect."""
    folder = tmp_path_factory.mktemp("clips")
    names = [f"clips/{i:02d}.mp4" for i in range(CLIPS)]
    for i, name in enumerate(names):
        write_media(folder / name, np.arange(90) / 15, tone(300 + 100 * i, SECONDS, RATE_HZ), RATE_HZ)
    halves = [
        (name, f"k{i % 2}", *part)
        for i, name in enumerate(names)
        for part in (("train", 0, 3.6), ("test", 3.6, 6))
    ]
    write_csv(folder / "own.csv", "path label split start end".split(), halves)
    words = [[f"{word}{(i // 2) % 2}" for word in speech.WORDS] for i in range(CLIPS)]
    whole = [(name, f"k{i % 2}", "test" if i >= 10 else "train", *words[i]) for i, name in enumerate(names)]
    write_csv(folder / "manifest.csv", ["path", "label", "split", *speech.WORDS], whole)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


def assert_rows(rows, methods, columns):
    assert sorted(row["method"] for row in rows) == sorted(methods)
    for row in rows:
        assert all(0 <= float(row[column]) <= 100 for column in columns), row


def test_the_studies_own_and_fingerprint_write_tables_and_figures(perform, folder, videos):
    methods = ["untrained", "oracle", "both"]
    rows = perform("own", "--videos", videos, "--only", *methods)
    assert_rows(rows, methods, [c for c in own.MEASURES if c != "sync"])
    for row in rows:
        with_tasks = row["method"] == "both"
        assert with_tasks == bool(row["order_cross"]) and (row["faulty"] == "0.6") == bool(row["AUROC"])
    results = folder / "results"
    assert (
        "| both |" in (results / "own.md").read_text()
        and "| oracle |" in (results / "own-0.6.md").read_text()
    )
    assert (results / "images" / "own.png").stat().st_size > 5000

    rows = perform("fingerprint", "--videos", videos, "--only", "untrained", "both")
    assert_rows(rows, ["untrained", "both"], [])
    assert all(
        f"{name} {s:g} joint instance R@1" in rows[0]
        for (_, name), ss in fingerprint.curves().items()
        for s in ss
    )
    assert (results / "images" / "fingerprint.png").stat().st_size > 5000
    assert "by picture" in (results / "fingerprint.md").read_text()


def test_the_study_recipe_trains_and_asks_within_the_training_parts(perform, folder, videos):
    rows = perform("recipe", "--videos", videos, "--only", "small")
    assert_rows(rows, ["small"], [c for c in recipe.MEASURES if "R@5" not in c])
    (written,) = (folder / "data").glob("*-recipe/manifest.csv")
    table = runs.read(written)
    assert len(table) == 2 * CLIPS and max(float(row["end"]) for row in table) == 3.6  # of 6 s
    assert {(row["split"], row["start"], row["end"]) for row in table} == {
        ("train", "0", "2.16"), ("test", "2.16", "3.6"),
    }  # fmt: skip
    assert "| small |" in (folder / "results" / "recipe.md").read_text()


def test_the_study_fingerprint_needs_the_checkpoints_of_own(perform, tmp_path, videos, capsys):
    with pytest.raises(SystemExit):
        perform("fingerprint", "--videos", videos, "--only", "xid", "--runs", tmp_path)
    assert "see its log.txt" in capsys.readouterr().err
    (log,) = tmp_path.glob("studies-quick/fingerprint/xid-*/log.txt")
    assert "run first: python -m studies.own" in log.read_text(encoding="utf-8")


def test_the_study_speech_splits_clips_into_intervals(perform, folder, videos):
    methods = ["untrained", "timewise", "timewise-oracle"]
    rows = perform("speech", "--videos", videos, "--only", *methods)
    without_r5 = [column for column in speech.MEASURES if "R@5" not in column]  # only four to find
    assert_rows(rows, methods, without_r5)
    (written,) = (folder / "data").glob("*manifest-0-swapped-seed0/intervals.csv")
    table = runs.read(written)
    assert len(table) == 10 * 4 + 4 and table[1]["start"] == "0.72" and table[1]["end"] == "1.44"
    assert "| timewise |" in (folder / "results" / "speech-0.md").read_text()


def test_the_folder_of_real_clips_must_be_given(perform, capsys):
    for name in ("own", "recipe", "speech", "esc10"):
        with pytest.raises(SystemExit):
            perform(name, "--list")
        assert "--videos DIR is missing" in capsys.readouterr().err


def test_the_study_esc10_trains_on_four_folds_and_tests_on_the_fifth(perform, folder, tmp_path):
    rows = []
    for name in ("dog", "rain"):
        for i in range(20):
            wave = tone({"dog": 300, "rain": 2000}[name] + 20 * i, 3.0, RATE_HZ)
            write_media(
                tmp_path / "audio" / f"{name}{i}.wav", wave=wave, rate_hz=RATE_HZ, codecs=(None, "pcm_s16le")
            )
            rows.append((f"{name}{i}.wav", i % 5 + 1, 0, name, True))
    (tmp_path / "meta").mkdir()
    write_csv(tmp_path / "meta" / "esc50.csv", "filename fold target category esc10".split(), rows)
    methods = ["statistics", "untrained", "in-domain"]
    found = perform("esc10", "--videos", tmp_path, "--only", *methods)
    assert_rows(found, methods, ["top1"])
    by_method = {row["method"]: row for row in found}
    assert float(by_method["statistics"]["top1"]) > 95  # low and high tones
    assert float(by_method["in-domain"]["top1 with statistics"]) > 80
    assert len(runs.numbers(by_method["in-domain"], "folds")) == 5
    seen = folder / "runs" / "studies-quick" / "esc10"
    (first,) = seen.glob("in-domain*/fold1/config.yaml")
    cfg = config.load(str(first))
    assert cfg.data.split == "train1"  # never the test fold
    assert cfg.audio.seconds == 1  # though the statistics are of whole sounds


@pytest.mark.parametrize("name, only", [("capacity", ["temporal"]), ("soft", ["mixed", "changed"])])
def test_studies_of_the_toy_write_rows_and_figures(perform, folder, name, only):
    rows = perform(name, "--only", *only)
    assert_rows(rows, only, ["v→a class R@1"])
    assert list((folder / "results" / "images").glob(f"{name}.png"))


def test_all_runs_are_different_and_have_valid_settings():
    for study in STUDIES.values():
        made = study.plan([0, 1])
        identities = {runs.identity(runs.describe(study, run, quick=False)) for run in made}
        assert len(identities) == len(made)
        for run in made:
            runs.configuration(study, run, False, "data", "out")


# --------------------------------------------------------------------------------------------- swapped sounds


def pitch_hz(path):
    """The pitch of a file's sound."""
    with media.Media(path, ("audio",)) as file:
        wave = file.sound(1.0, RATE_HZ, RATE_HZ)
    return np.abs(np.fft.rfft(wave)).argmax()


def test_swapped_sounds_are_others_and_the_manifest_marks_them(videos, tmp_path):
    path = swapped.write(tmp_path, videos / "own.csv", 0.3, seed=1)
    rows = runs.read(path)
    faulty = [row for row in rows if row["faulty"] == "1"]
    assert len(faulty) == 4 and all(row["split"] == "train" for row in faulty)  # 30 % of 14
    for row in rows:
        number = int(row["original"][-6:-4])
        right = abs(pitch_hz(path.parent / row["path"]) - (300 + 100 * number)) <= 2
        assert right == (row["faulty"] == "0")
        assert row["part"] == ("test" if number >= 10 else "train")
        if row["faulty"] == "1":
            with media.Media(path.parent / row["path"]) as new, media.Media(videos / row["original"]) as old:
                assert np.array_equal(new.frames([0.5, 2.0]), old.frames([0.5, 2.0]))
    before = path.read_bytes()
    shutil.rmtree(path.parent / "swapped")
    assert swapped.write(tmp_path, videos / "own.csv", 0.3, seed=1) == path and path.read_bytes() == before


def test_each_swapped_clip_gets_the_sound_of_another_one():
    got = swapped.swaps(range(100, 200), 0.3, seed=0)
    assert len(got) == 30 and set(got) == set(got.values()) and all(i != j for i, j in got.items())
    assert got == swapped.swaps(range(100, 200), 0.3, seed=0) != swapped.swaps(range(100, 200), 0.3, seed=1)
    assert swapped.swaps(range(100), 0.0, seed=0) == {}


# ----------------------------------------------------------------------------------------- soft targets mixed


def targets(bank, context):
    """Soft targets of eight instances among 64 candidates, and their own memories, 2×8×D each."""
    with context:
        found = bank.candidates(torch.arange(8), 64, 0)
        v, a = bank.video[found.index], bank.audio[found.index]
        own_side = v[found.column], a[found.column]
        return torch.stack(losses.soft_targets("cycle", *own_side, v, a, found.valid, 0.1, 0.3)), torch.stack(
            own_side
        )


def change(method, name, table):
    return soft.changed_targets(runs.Run({"method": method, "change": name}, 0, ()), table)


def test_mixed_targets_are_between_the_truth_and_the_estimate():
    table, plain = world(0.3), losses.soft_targets
    bank = bank_by_kind(table, noise=0.3)
    estimate, _ = targets(bank, contextlib.nullcontext())
    truth, _ = targets(bank, robust.oracle("soft-oracle", table))
    mixed, _ = targets(bank, change("mixed", "0.25 of the truth", table))
    torch.testing.assert_close(mixed, 0.25 * truth + 0.75 * estimate)
    assert (truth - estimate).norm() > 0.5
    assert torch.equal(targets(bank, change("mixed", "0 of the truth", table))[0], estimate)
    assert losses.soft_targets is plain


def test_uncertain_targets_stay_near_the_own_memory():
    table = world(0.3)
    bank = bank_by_kind(table, noise=0.3)
    estimate, own_side = targets(bank, contextlib.nullcontext())
    found, _ = targets(bank, change("changed", "by certainty", table))
    own_side = own_side.flip(0)  # S_v gives targets of sound, S_a of picture
    share = ((found - own_side) * (estimate - own_side)).sum(2) / (estimate - own_side).square().sum(2)  # 2×8
    torch.testing.assert_close(found, share[..., None] * estimate + (1 - share[..., None]) * own_side)
    assert (share > 0).all() and (share <= 1 + 1e-4).all() and share.min() < 0.99 < share.max()
