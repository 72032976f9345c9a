"""The studies, each in its --quick form, and their measures on banks with a known answer."""

import csv
import shutil

import numpy as np
import pytest
import torch
from conftest import tone, write_media

import train
from avid import config, datasets, evaluation, losses, memory_bank, toy
from studies import both, measures, moments, real, robust, runs, temporal

STUDIES = {study.name: study for study in (robust.STUDY, temporal.STUDY, both.STUDY, moments.STUDY)}
SOME = {  # methods of the quick form that take every branch of `measure`
    "robust": ["untrained", "xid", "robust", "oracle", "soft-oracle"],
    "temporal": ["contrast", "all", "all-hard-no-positives", "sound-alone"],
    "both": ["robust_temporal"],
    "moments": ["untrained, as toy", "toy_temporal"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_writes_its_tables_and_figures(name, perform, folder, capsys):
    rows = perform(name, "--only", *SOME[name])
    assert [row["method"] for row in rows] == sorted(SOME[name])
    measured = {"moments": ("similarity exact", "brightest on the thing %")}
    for row in rows:
        for column in measured.get(name, ("kind probe video", "v→a class R@1")):
            assert 0 <= float(row[column]) <= 100
    results = folder / "results"
    table = {"robust": "robust-0.6", "moments": "moments-sync"}.get(name, name)
    written = (results / f"{table}.md").read_text(encoding="utf-8")
    assert all(method in written for method in SOME[name] if method != "untrained")
    assert (results / "images" / f"{name}.png").stat().st_size > 5000
    assert name != "temporal" or (results / "images" / "temporal-maps.png").stat().st_size > 5000
    before = (results / f"{name}.csv").read_bytes()
    capsys.readouterr()
    # again: nothing is left to do, and the result is the same
    perform(name, "--only", *SOME[name], draws=False)
    assert " 0 to do" in capsys.readouterr().out
    assert (results / f"{name}.csv").read_bytes() == before


def test_the_study_real_evaluates_the_checkpoint_of_another_study(perform, folder, tmp_path, capsys):
    perform("robust", "--only", "xid")
    (quick,) = (folder / "runs" / "studies-quick" / "robust").glob("xid-*")
    (run,) = (run for run in robust.STUDY.plan([0]) if run.group == robust.group("xid", 0.3, robust.LONG))
    shutil.copytree(quick, runs.folder_of(robust.STUDY, run, tmp_path / "studies" / "robust", quick=False))
    lines = ["filename,fold,target,category,esc10"]
    for name in ("dog", "rain"):
        for i in range(20):
            wave = tone({"dog": 300, "rain": 2000}[name] + 20 * i, 1.2, 16000)
            write_media(
                tmp_path / "esc" / "audio" / f"{name}{i}.wav",
                wave=wave,
                rate_hz=16000,
                codecs=(None, "pcm_s16le"),
            )
            lines.append(f"{name}{i}.wav,{i % 5 + 1},0,{name},True")
    (tmp_path / "esc" / "meta").mkdir()
    (tmp_path / "esc" / "meta" / "esc50.csv").write_text("\n".join(lines))
    world = toy.write(
        tmp_path, config.Toy(train=3, test=1, seconds=6.0, size=40), seed=0, workers=1, progress=False
    )
    (world / "train" / "silent.mp4").write_bytes(b"no video")
    command = ["--esc10", tmp_path / "esc", "--runs", tmp_path, "--results", tmp_path / "results"]
    command = [str(word) for word in command]
    real.main(real.command_line([*command, "--media", str(world / "train")]))
    assert "left out" in capsys.readouterr().out
    with open(tmp_path / "results" / "real.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["untrained, as in robust", "xid"]
    assert all(float(row["ESC-10 top1"]) > 80 for row in rows)  # a low and a high tone
    assert all(
        (tmp_path / "results" / "images" / f"real-{name}.png").stat().st_size > 5000
        for name in ("sounds", "neighbours")
    )
    before = (tmp_path / "results" / "real.csv").read_bytes()
    real.main(real.command_line(command))  # again: no checkpoint is evaluated twice
    assert (tmp_path / "results" / "real.csv").read_bytes() == before


def test_only_takes_methods_and_changes_and_names_unknown_ones(tmp_path, capsys):
    def chosen(*names):
        options = ["--list", "--results", str(tmp_path), "--seeds", "3", "--only", *names]
        runs.main(robust.STUDY, runs.command_line("", options))
        return [line.split("/")[-1].split(":")[0] for line in capsys.readouterr().out.splitlines()[1:]]

    long = chosen(robust.LONG)
    assert len(long) == 9 and all("-48epochs-seed3-" in name for name in long)
    assert len(chosen(robust.LONG, "untrained")) == 10
    with pytest.raises(SystemExit) as end:
        chosen("xid", "xdi")
    assert end.value.code == 2 and "no xdi in this study; it has xid," in capsys.readouterr().err


def test_gains_are_between_rows_of_the_same_seed():
    def rows(by_seed):
        return [dict.fromkeys(robust.MEASURES, value) | {"seed": seed} for seed, value in by_seed.items()]

    some, others = rows({"0": "50.5", "1": "60", "2": "70"}), rows({"2": "71", "0": "50"})
    gains = robust.difference(some, others)
    assert [float(row["kind probe video"]) for row in gains] == [0.5, -1]  # seed 1 is in one of them only
    assert runs.mean_std(robust.difference(some, some), "AUROC") == (0, 0)  # zero is a number, too


def test_soft_targets_of_the_oracle_are_means_over_the_kind():
    seen, heard = ["drum", "bell", "drum", "voice"], ["drum", "drum", "music", "voice"]
    columns = {"label": seen, "sound": heard, "faulty": ["0", "1", "1", "0"]}
    table = datasets.Table("toy", None, list("abcd"), None, [], None, None, None, columns, [])
    bank = memory_bank.MemoryBank(4, 8, momentum=0.5, seed=0)
    with robust.oracle("soft-oracle", table):
        found = bank.candidates(torch.tensor([0, 1, 2]), 32, 0)
        video, audio = bank.video[found.index], bank.audio[found.index]
        own = video[found.column], audio[found.column]
        v, a = losses.soft_targets("cycle", *own, video, audio, found.valid, 0.02, 0.07)
    assert set(found.index[found.valid].tolist()) == {0, 1, 2, 3}  # all are candidates
    torch.testing.assert_close(v[0], (bank.audio[0] + bank.audio[1]) / 2)  # a drum is seen, two are heard
    torch.testing.assert_close(v[1], bank.audio[1])  # a bell is seen, none is heard: its own
    torch.testing.assert_close(a[1], (bank.video[0] + bank.video[2]) / 2)  # a drum is heard, two are seen
    torch.testing.assert_close(a[2], bank.video[2])  # music: its own
    assert losses.soft_targets.__name__ == "soft_targets" and not bank.candidates.__qualname__.startswith(
        "oracle"
    )


def test_all_runs_are_different_and_have_valid_settings():
    for study in STUDIES.values():
        made = study.plan([0])
        identities = {runs.identity(runs.describe(study, run, quick=False)) for run in made}
        assert len(identities) == len(made)
        for run in made:
            runs.configuration(study, run, False, "data", "out")


def test_a_run_with_other_settings_replaces_the_old_one(tmp_path):
    path = tmp_path / "study.csv"

    def row(method, settings, **measured):
        return {"method": method, "seed": "0", "settings": settings, "world": "5", "versions": "", **measured}

    runs.add(path, row("xid", "a=1", top1=50.0))
    runs.add(path, row("robust", "a=1", top1=60.0, curve=[1.0, 2.5]))
    runs.add(path, row("xid", "a=2", top1=1 / 3))
    rows = runs.read(path)
    assert [(r["method"], r["settings"], r["top1"], r["curve"]) for r in rows] == [
        ("robust", "a=1", "60", "1 2.5"),
        ("xid", "a=2", "0.333333", ""),
    ]
    assert runs.numbers(rows[0], "curve") == [1.0, 2.5]
    assert [p.name for p in tmp_path.iterdir()] == ["study.csv"]


def test_a_table_has_means_and_sample_deviations():
    rows = [{"x": "1"}, {"x": "2"}, {"x": "6"}, {"x": ""}]
    assert runs.table(["a", "b"], [["one", (rows, "x")], ["none", (rows[3:], "x")]]).splitlines()[2:] == [
        "| one | 3.0 ± 2.6 |",
        "| none |  |",
    ]


def test_a_probe_knows_the_classes_of_videos_that_lack_one(monkeypatch):
    def of(labels):
        x = np.array([[[label == "a", label == "b"]] for label in labels], np.float32)  # n×1×2
        both = {"video": x, "audio": x}
        return evaluation.Features(np.arange(len(x)), both, both), datasets.of_files(labels)

    parts = [of("ab" * 10), of("bbb")]
    for _, table in parts:
        table.columns["motion"] = table.paths
    found = [found for found, _ in parts], [table for _, table in parts]
    monkeypatch.setattr(measures, "features", lambda *_: found)
    result = measures.feature_quality(None, config.load("toy"), ("motion",))
    assert result["motion probe video"] == result["motion audio R@1"] == 100


def test_tables_go_between_their_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x -->\nold\n<!-- /x -->\nb\n<!-- y -->\n<!-- /y -->\n", encoding="utf-8")
    runs.insert(page, "x", "| \\1 new |\n")
    runs.insert(page, "z", "nowhere")
    assert (
        page.read_text(encoding="utf-8")
        == "a\n<!-- x -->\n| \\1 new |\n<!-- /x -->\nb\n<!-- y -->\n<!-- /y -->\n"
    )


# --------------------------------------------------------------------------------------------------- measures


def world(faulty, n=200):
    """The table of a toy world with a share of faulty pairs, without files."""
    rows = toy.table(config.Toy(train=n, test=1, faulty=faulty), seed=0)[:n]
    columns = {key: [str(row[key]) for row in rows] for key in rows[0]}
    empty = np.zeros(n)
    return datasets.Table(
        "toy", None, columns["path"], empty, list(toy.KINDS), empty, empty, empty, columns, []
    )


def bank_by_kind(table, noise=0.0):
    """A bank in which every picture and every sound lies where its kind does."""
    directions = torch.nn.functional.normalize(
        torch.randn(len(measures.SOUNDS), 32, generator=torch.Generator().manual_seed(0))
    )
    bank = memory_bank.MemoryBank(len(table), 32, 0.0, seed=1)
    video, audio = (
        directions[[measures.SOUNDS.index(kind) for kind in table.columns[c]]] for c in ("label", "sound")
    )
    if noise:
        video, audio = (
            x + noise * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
            for x in (video, audio)
        )
    bank.update(torch.arange(len(table)), video, audio)
    return bank


def test_a_bank_that_knows_the_kinds_detects_faulty_pairs_and_a_random_one_does_not():
    table, loss = world(0.3), config.Loss()
    known = measures.weight_statistics(bank_by_kind(table), table, loss)
    assert known["AUROC"] == 1 and known["weight true"] > 0.8 > 0.4 > known["weight faulty"] >= 0.25
    assert sum(known["weights true"]) == 140 and sum(known["weights faulty"]) == 60
    unknown = measures.weight_statistics(memory_bank.MemoryBank(200, 32, 0.5, seed=0), table, loss)
    assert 0.35 < unknown["AUROC"] < 0.65
    assert measures.weight_statistics(bank_by_kind(world(0)), world(0), loss) == {}


@pytest.mark.parametrize("estimator", measures.ESTIMATORS)
def test_soft_targets_of_a_bank_that_knows_the_kinds_stay_within_them(estimator):
    table = world(0.0)
    masses, matrix = measures.soft_targets(bank_by_kind(table), table, config.Loss(), estimator)
    assert masses[f"{estimator} same kind"] > 99
    assert masses[f"{estimator} itself"] == pytest.approx(5, abs=0.1)  # one of twenty of its kind
    np.testing.assert_allclose(np.reshape(matrix, (10, 12)), np.eye(10, 12), atol=0.01)
    masses, matrix = measures.soft_targets(
        memory_bank.MemoryBank(200, 32, 0.5, seed=0), table, config.Loss(), estimator
    )
    assert masses[f"{estimator} same kind"] == pytest.approx(10, abs=4)


@pytest.mark.parametrize("estimator", measures.ESTIMATORS)
def test_the_estimates_are_those_that_training_uses(estimator):
    bank = bank_by_kind(world(0.3), noise=0.1)
    v, a = bank.video.double(), bank.audio.double()
    S_v, S_a = losses.soft_target_matrices(estimator, v, a, v, a, tau_s=0.1, tau_t=0.2)
    valid = torch.ones(200, dtype=torch.bool)
    means = losses.soft_targets(estimator, bank.video, bank.audio, bank.video, bank.audio, valid, 0.1, 0.2)
    torch.testing.assert_close(means[0], (S_v @ a).float())
    torch.testing.assert_close(means[1], (S_a @ v).float())


def test_the_cycle_leaves_out_faulty_neighbours():
    """The neighbours by picture include candidates whose sound is wrong; the cycle leaves them out."""
    table = world(0.3)
    bank = bank_by_kind(table)
    on_faulty = {
        e: measures.soft_targets(bank, table, config.Loss(), e)[0][f"{e} on faulty"]
        for e in ("neighbor", "swapped", "cycle")
    }
    assert on_faulty["neighbor"] > 20 and on_faulty["swapped"] > 20 and on_faulty["cycle"] < 1


def test_the_oracle_weighs_by_the_manifest():
    table = world(0.3)
    faulty = np.array(table.columns["faulty"]) == "1"
    index = torch.arange(200)
    with robust.oracle("oracle", table):
        assert torch.equal(train.pair_weights(index, None, None, robust=True), torch.tensor(~faulty).float())
        assert torch.equal(train.pair_weights(index, None, None, robust=False), torch.ones(200))
