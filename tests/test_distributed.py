"""One process or many: batch norm over ranks against torch's on the whole batch, signals, too few GPUs."""

import os
import signal
import time

import forked
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed import fake_pg  # noqa: F401  registers the backend "fake"

from avid import distributed
from avid.files import ConfigError

# shapes of the global batch, for 2 and 3 ranks
SHAPES = {"linear": (6, 5), "sound": (6, 5, 4, 3), "video": (6, 5, 2, 4, 3)}
FORMATS = {"sound": torch.channels_last, "video": torch.channels_last_3d}


class Net(nn.Module):
    """A small network of two batch norms, the second with or without scale and shift."""

    def __init__(self, kind, affine, momentum=0.1):
        super().__init__()
        norm = {"linear": nn.BatchNorm1d, "sound": nn.BatchNorm2d, "video": nn.BatchNorm3d}[kind]
        self.first, self.second = norm(5, 1e-3, momentum), norm(5, affine=affine)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def make_case(kind, affine, offset):
    """A network in float64, a batch around `offset`, and the factors of the outputs in the loss."""
    generator = torch.Generator().manual_seed(len(kind) + affine)
    net = Net(kind, affine).double().train()
    for x in net.parameters():
        x.data = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    x, weight = torch.randn(2, *SHAPES[kind], generator=generator, dtype=torch.float64)
    x = x * torch.arange(1.0, 7.0).view(-1, *[1] * (x.dim() - 1)) + offset  # ranks differ
    if kind in FORMATS:
        x = x.to(memory_format=FORMATS[kind])
    return net, x, weight


def results(net, x, weight, call=None):
    """Two steps: outputs, gradients of the input and of the parameters, buffers."""
    x, outputs = x.clone().requires_grad_(), []
    for _ in range(2):
        y = (net if call is None else call)(x)
        assert y.dtype == x.dtype and y.stride() == x.stride()
        (y * weight).sum().backward()
        outputs.append(y.detach())
    return outputs, x.grad, {n: p.grad for n, p in net.named_parameters()}, dict(net.named_buffers())


CASES = [(kind, affine, offset) for kind in SHAPES for affine in (True, False) for offset in (0.0, 1e6)]


def check_rank(rank, world, folder):
    """Runs in every rank; a failed assertion ends it with an exit code."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    for kind, affine, offset in CASES:
        net, x, weight = make_case(kind, affine, offset)
        outputs, dx, grads, buffers = results(net, x, weight)  # torch's batch norm on the whole batch
        net, _, _ = make_case(kind, affine, offset)
        names = list(net.state_dict())
        net = distributed.sync_batch_norm(net)
        assert isinstance(net.first, distributed.SyncBatchNorm) and list(net.state_dict()) == names
        own = results(net, x.chunk(world)[rank], weight.chunk(world)[rank])
        # an offset of 1e6 costs six of sixteen digits; sums of squares would cost twelve
        close = {"rtol": 1e-11, "atol": 1e-11} if not offset else {"rtol": 1e-7, "atol": 1e-7}
        for local, whole in zip(own[0], outputs, strict=True):
            torch.testing.assert_close(local, whole.chunk(world)[rank], **close)
        torch.testing.assert_close(own[1], dx.chunk(world)[rank], **close)
        torch.testing.assert_close({n: distributed.total(g) for n, g in own[2].items()}, grads, **close)
        torch.testing.assert_close(own[3], buffers, **close)
        reference, _, _ = make_case(kind, affine, offset)
        reference.load_state_dict(net.state_dict())
        assert torch.equal(net.eval()(x), reference.eval()(x))  # evaluation is torch's own
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_batch_norm_over_ranks_is_torchs_on_the_whole_batch(world, tmp_path):
    forked.ranks(check_rank, world, str(tmp_path))


class Both(nn.Module):
    """Two networks side by side."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = (distributed.sync_batch_norm(Net("linear", True)) for _ in range(2))

    def forward(self, x):
        return self.used(x), self.unused(x)


def check_unused(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    net = Both()
    model = distributed.data_parallel(
        net, distributed.World(rank, world, torch.device("cpu")), sync_bn=True, unused=True
    )
    for _ in range(2):
        model(torch.randn(6, 5))[0].square().sum().backward()
        assert all(x.grad is not None for x in net.used.parameters())
        assert all(x.grad is None for x in net.unused.parameters())
    dist.destroy_process_group()


def test_what_no_loss_reaches_has_no_gradient_over_ranks_either(tmp_path):
    """As in one process: with a gradient of zeros, Adam's weight decay would move it."""
    forked.ranks(check_unused, 2, str(tmp_path))


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_statistics_are_float32_in_half_precision(half):
    """Values around 300, whose squares and sums these types cannot hold."""
    norm, reference = distributed.sync_batch_norm(nn.BatchNorm2d(5)), nn.BatchNorm2d(5)
    x = (300 + torch.randn(8, 5, 6, 6)).to(half).to(memory_format=torch.channels_last)
    y, expected = norm(x), reference(x.float())
    assert y.dtype == half and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.float(), expected, atol=0.02, rtol=0.02)
    torch.testing.assert_close(dict(norm.named_buffers()), dict(reference.named_buffers()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_compiled_batch_norm_is_one_graph_with_the_same_results(dtype):
    """As rank 0 of four processes; the others are fake and send nothing."""
    dist.init_process_group("fake", rank=0, world_size=4, store=dist.HashStore())
    try:
        found = []
        for compiled in (False, True):
            net, x, weight = make_case("video", True, 0.0)
            net = distributed.sync_batch_norm(net).to(dtype if dtype == torch.float64 else torch.float32)
            call = torch.compile(net, fullgraph=True, backend="aot_eager") if compiled else net
            found.append(results(net, x.to(dtype), weight.to(dtype), call))
        torch.testing.assert_close(found[1], found[0])
        assert found[0][1].abs().sum() > 0
    finally:
        dist.destroy_process_group()
        torch._dynamo.reset()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("half", [torch.float32, torch.bfloat16, torch.float16])
def test_the_written_out_kernels_equal_those_of_cuda(half):
    x, dy = torch.randn(2, 6, 5, 2, 4, 3, device="cuda").to(half).to(memory_format=torch.channels_last_3d)
    weight, bias = torch.rand(2, 5, device="cuda")
    found = []
    for kernels in (torch, distributed.Kernels):
        running = [torch.zeros(5, device="cuda"), torch.ones(5, device="cuda")]
        means, invstds = (v.expand(2, 5).contiguous() for v in kernels.batch_norm_stats(x, 1e-5))
        counts = torch.tensor([144.0, 144.0], device="cuda")
        mean, invstd = kernels.batch_norm_gather_stats_with_counts(
            x, means, invstds, *running, 0.1, 1e-5, counts
        )
        y = kernels.batch_norm_elemt(x, weight, bias, mean, invstd, 1e-5)
        reduced = kernels.batch_norm_backward_reduce(dy, x, mean, invstd, weight, True, True, True)
        dx = kernels.batch_norm_backward_elemt(dy, x, mean, invstd, weight, *reduced[:2], counts.int())
        found.append([means, invstds, *running, mean, invstd, y, *reduced, dx])
    torch.testing.assert_close(found[0], found[1], atol=1e-2, rtol=1e-2)


# ---------------------------------------------------------------------------------------------------- signals


def status_after(numbers, gap_s):
    """The exit status of a process that receives these signals; 0 if it runs to its end."""
    child = os.fork()
    if not child:
        try:
            stop = distributed.StopSignal()
            stop.GRACE_S = 0.2
            for number in numbers:
                signal.raise_signal(number)
                time.sleep(gap_s)
            os._exit(0 if stop.asked == signal.Signals(numbers[0]).name else 1)
        except BaseException:
            os._exit(2)
    return os.waitpid(child, 0)[1]


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_once_the_grace_period_is_over(first, second):
    assert status_after([first, second], 0.3) == second  # ended by the signal itself
    for gap_s in (0.0, 0.003, 0.03):
        assert status_after([first, second], gap_s) == 0
    assert status_after([first, *[second] * 50], 0.0) == 0


def test_with_everything_saved_the_first_signal_exits_and_the_second_is_ignored():
    stop = distributed.StopSignal()
    try:
        with pytest.raises(SystemExit) as left, stop.at_once():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)  # as from torchrun, while files are closed
        assert left.value.code == 128 + signal.SIGTERM
    finally:
        stop.release()


# ------------------------------------------------------------------------------------------------------- GPUs


def test_more_processes_than_gpus_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(
        ConfigError, match=r"4 processes .* it has 2; start fewer: torchrun --nproc-per-node 2$"
    ):
        distributed.start()


def test_each_process_has_its_own_gpu_from_the_start(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert distributed.start().device == torch.device("cuda", 3) and chosen == [torch.device("cuda", 3)]


def test_any_rank_answers_each_flag_on_its_own():
    assert distributed.any_rank(True, False, "SIGTERM", "") == [True, False, True, False]
