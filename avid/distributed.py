"""One process or many: torchrun's set-up, gathering over ranks, who talks, and when all of them leave.

In: the environment variables that torchrun sets; without them there is one process.
Out: `start()` tells rank, world size and device; the rest works alike for one and many.
"""

import contextlib
import os
import re
import signal
import sys
import time
import traceback
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_grad
from torch import nn
from tqdm import tqdm


class World(NamedTuple):
    rank: int
    size: int
    device: torch.device


def start():
    """Join the ranks that torchrun started: NCCL on GPUs, Gloo on CPUs. Without torchrun: one process."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        store, mine, world = next(dist.rendezvous("env://", timeout=timedelta(minutes=30)))
        if (
            os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
        ):  # of several machines, each counts for itself
            # what torchrun starts again finds the addresses of those that are gone, and waits for them for ever
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        dist.init_process_group(
            backend, store=store, rank=mine, world_size=world, timeout=timedelta(minutes=30)
        )
    return World(rank(), world_size(), device)


LOST = re.compile(
    r"Connection (closed|reset|refused)|[Tt]imed out|[Bb]roken pipe|peer"
)  # what Gloo says of a rank that has gone


@contextlib.contextmanager
def clean_end():
    """Whatever a program ends with, it ends: nothing is waited for.

    The end of another rank ends this one, with one line and exit code 1; torchrun, or the same command, may start them again.
    """
    try:
        yield
    except BaseException as error:
        # the traceback holds the frames, and these the decoding processes, which the interpreter would wait for at its end
        traceback.clear_frames(error.__traceback__)
        gone = isinstance(error, RuntimeError) and (
            isinstance(error, dist.DistError) or LOST.search(str(error))
        )
        if world_size() == 1 or not gone:
            raise
        print(
            f"error: rank {rank()} ends, as another one has gone ({' '.join(str(error).split())[:120]}); what that one said is the "
            "cause; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        raise SystemExit(1) from None


def end():
    """Leave the other ranks."""
    if dist.is_initialized():
        # Gloo's thread needs the interpreter to let go of the last message, and torch joins that thread without giving way
        time.sleep(0.5)
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(x):
    """The tensors of all ranks, in the order of ranks: b×… on every rank → world·b×… (no gradient)."""
    if world_size() == 1:
        return x.detach()
    everyone = x.new_empty(world_size() * len(x), *x.shape[1:])
    dist.all_gather_into_tensor(everyone, x.detach().contiguous())
    return everyone


def total(x):
    """The sum of a tensor over the ranks (no gradient)."""
    x = x.detach().clone()
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def any_rank(flag):
    """True where `flag` is true on at least one rank; goes by the CPU, so that no GPU has to wait."""
    if world_size() == 1:
        return bool(flag)
    votes = torch.tensor(int(bool(flag)))
    dist.all_reduce(votes)
    return bool(votes)


def gather_objects(x):
    """What all ranks hold, anything that can be pickled, as a list in the order of ranks."""
    if world_size() == 1:
        return [x]
    everyone = [None] * world_size()
    dist.all_gather_object(everyone, x)
    return everyone


def wait():
    """Until all ranks are here."""
    any_rank(False)


def say(world, text):
    """A line from rank 0, above the progress bar."""
    if world.rank == 0:
        tqdm.write(text)


class StopSignal:
    """Remembers SIGTERM or Ctrl-C until the step is done; a second one ends at once."""

    def __init__(self):
        self.asked, self.exit_code, self.saved = "", 128 + signal.SIGTERM, False
        self.before = {
            number: signal.signal(number, self.remember) for number in (signal.SIGTERM, signal.SIGINT)
        }

    def remember(self, number, _):
        self.asked, self.exit_code = signal.Signals(number).name, 128 + number
        signal.signal(number, signal.SIG_DFL)
        if self.saved:
            raise SystemExit(self.exit_code)

    @contextlib.contextmanager
    def at_once(self):
        """Within, all that counts is saved: a signal does not wait for the end of a step, nor of a check that takes minutes."""
        self.saved = True
        try:
            if self.asked:
                raise SystemExit(self.exit_code)
            yield
        finally:
            self.saved = False

    def release(self):
        """From here on signals do again what they did before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


class BatchNormOverRanks(nn.modules.batchnorm._BatchNorm):
    """Batch norm with the statistics of all ranks' batches, for CPUs, where torch.nn.SyncBatchNorm refuses to work."""

    def _check_input_dim(self, x):
        pass

    def forward(self, x):  # B×C×…
        if not self.training:
            return super().forward(x)
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = x.numel() // x.shape[1] * world_size()  # ranks' batches are of one size
        mean = dist_grad.all_reduce(x.sum(dims)) / count
        centred = x - mean.view(shape)
        var = dist_grad.all_reduce((centred * centred).sum(dims)) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * (count / (count - 1)), self.momentum)
        y = centred * (var + self.eps).rsqrt().view(shape)
        return y * self.weight.view(shape) + self.bias.view(shape) if self.affine else y


def sync_batch_norm(model, device):
    """Replace every batch norm by one whose statistics are those of the global batch; parameters and names stay."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for name, child in model.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            synced = BatchNormOverRanks(child.num_features, child.eps, child.momentum, child.affine)
            synced.load_state_dict(child.state_dict())
            setattr(model, name, synced)
        else:
            sync_batch_norm(child, device)
    return model
