"""What a run prints and logs: its first line, and TensorBoard's files beside metrics.jsonl."""

import importlib.util
import json

import pytest
import torch

from avid import cli, config, distributed, run
from avid.run import Folder

CPU = distributed.World(0, 1, torch.device("cpu"))


# --------------------------------------------------------------------------------------------- the first line


def test_the_first_line_says_device_processes_and_precision(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    cfg = config.load("toy", ["optim.amp=bf16"])
    assert run.describe(cfg, CPU) == "CPU with 3 threads, 1 process, float32"
    assert run.describe(cfg, CPU._replace(size=4)) == "CPU with 3 threads, 4 processes, float32"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Big GPU {device.index}")
    gpu = distributed.World(1, 2, torch.device("cuda", 1))
    for amp, precision in (("bf16", "bf16 autocast"), ("fp16", "fp16 autocast"), ("none", "float32")):
        cfg = config.load("toy", [f"optim.amp={amp}"])
        assert run.describe(cfg, gpu) == f"Big GPU 1, 2 processes, {precision}"


# ------------------------------------------------------------------------------------------------ TensorBoard


class Table:
    """A table of three videos, with what a run folder reads of it."""

    paths, start_s, end_s = ["a", "b", "c"], torch.zeros(3), torch.ones(3)

    def __len__(self):
        return 3


@pytest.fixture
def scalars():
    """A function that reads what TensorBoard shows of a folder: {name: {step: value}}."""
    pytest.importorskip("tensorboard", reason="tensorboard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(out):
        shown = EventAccumulator(str(out))
        shown.Reload()
        return {name: {e.step: e.value for e in shown.Scalars(name)} for name in shown.Tags()["scalars"]}

    return read


def folder_of(out, *overrides):
    return Folder(config.load("toy", [f"out={out}", "log.tensorboard=true", *overrides]), CPU)


def test_tensorboard_shows_the_numbers_of_the_log_also_after_a_resume(tmp_path, scalars):
    first = folder_of(tmp_path)
    assert first.resume(Table()) == 0
    first.log(1, 0.5, loss=3.0, **{"v→a class R@1": 10})
    first.save(1)
    first.log(2, 1.0, loss=2.0)  # lost: the run is killed before the next save
    first.log(3, 1.5, loss=1.75, not_finite="xid nan", files=["a.mp4"])
    again = folder_of(tmp_path)
    assert again.resume(Table()) == 1
    again.log(2, 1.0, loss=2.5)
    shown = scalars(tmp_path)
    assert shown == {"epoch": {1: 0.5, 2: 1.0}, "loss": {1: 3.0, 2: 2.5}, "v→a class R@1": {1: 10.0}}
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line["loss"] for line in logged} == shown["loss"]


def test_without_the_setting_nothing_is_written_for_tensorboard(tmp_path):
    folder = folder_of(tmp_path, "log.tensorboard=false")
    folder.resume(Table())
    folder.log(1, 0.5, loss=3.0)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "metrics.jsonl", ".last.pt.lock"}


def test_without_the_package_one_line_says_so_before_anything_is_written(tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == "tensorboard" else find(name, *more)
    )
    with pytest.raises(SystemExit) as ended:
        cli.training("", [f"out={tmp_path / 'run'}", "log.tensorboard=true"])
    expected = "error: log.tensorboard=true needs the package: pip install tensorboard, or leave it out\n"
    assert ended.value.code == 2 and capsys.readouterr().err == expected
    assert not (tmp_path / "run").exists()
