"""One process or many: batch norm over ranks against torch's on the whole batch, signals, GPUs that are too few."""


import pytest
import torch
import torch.distributed as dist
from torch import nn

from avid import distributed

SHAPES = {"linear": (6, 5), "sound": (6, 5, 4, 3), "video": (6, 5, 2, 4, 3)}  # of the global batch; 2 and 3 ranks
FORMATS = {"sound": torch.channels_last, "video": torch.channels_last_3d}


class Net(nn.Module):
    """A batch norm between others, with and without scale and shift, in place of a network."""

    def __init__(self, kind, affine, momentum=0.1):
        super().__init__()
        norm = {"linear": nn.BatchNorm1d, "sound": nn.BatchNorm2d, "video": nn.BatchNorm3d}[kind]
        self.first, self.second = norm(5, 1e-3, momentum), norm(5, affine=affine)

    def forward(self, x):
        return self.second(self.first(x).tanh())


def a_case(kind, affine, offset):
    """A network in float64, a batch far from 0 where `offset` says so, and what the outputs are multiplied by."""
    generator = torch.Generator().manual_seed(len(kind) + affine)
    net = Net(kind, affine).double().train()
    for x in net.parameters():
        x.data = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    x, weight = torch.randn(2, *SHAPES[kind], generator=generator, dtype=torch.float64)
    x = x * torch.arange(1.0, 7.0).view(-1, *[1] * (x.dim() - 1)) + offset  # ranks differ
    if kind in FORMATS:
        x = x.to(memory_format=FORMATS[kind])
    return net, x, weight


def results(net, x, weight):
    """Two steps: outputs, gradients of the input and of the parameters, buffers."""
    x, outputs = x.clone().requires_grad_(), []
    for _ in range(2):
        y = net(x)
        assert y.dtype == x.dtype and y.stride() == x.stride()
        (y * weight).sum().backward()
        outputs.append(y.detach())
    return outputs, x.grad, {n: p.grad for n, p in net.named_parameters()}, dict(net.named_buffers())


CASES = [(kind, affine, offset) for kind in SHAPES for affine in (True, False) for offset in (0.0, 1e4)]


def one_rank(rank, world, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    for kind, affine, offset in CASES:
        net, x, weight = a_case(kind, affine, offset)
        outputs, dx, grads, buffers = results(net, x, weight)  # torch's, of the whole batch
        net, _, _ = a_case(kind, affine, offset)
        names = list(net.state_dict())
        net = distributed.sync_batch_norm(net)
        assert isinstance(net.first, distributed.SyncBatchNorm) and list(net.state_dict()) == names
        own = results(net, x.chunk(world)[rank], weight.chunk(world)[rank])
        grads_over_ranks = {name: distributed.total(x) for name, x in own[2].items()}
        # the mean of 1e4 takes four of sixteen digits
        close = {"rtol": 1e-10 if not offset else 1e-6, "atol": 1e-10 if not offset else 1e-6}
        for x, y in zip(own[0], outputs, strict=True):
            torch.testing.assert_close(x, y.chunk(world)[rank], **close)
        torch.testing.assert_close(own[1], dx.chunk(world)[rank], **close)
        torch.testing.assert_close(grads_over_ranks, grads, **close)
        torch.testing.assert_close(own[3], buffers, **close)
        net.eval()
        torch.testing.assert_close(net(x), net(x.chunk(world)[rank]), **close) if world == 1 else None
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 3])
def test_batch_norm_over_ranks_is_torchs_on_the_whole_batch(world, tmp_path):
    torch.multiprocessing.spawn(one_rank, (world, str(tmp_path)), nprocs=world)
