"""Where a process runs: its rank among the others, its device and its precision."""

import inspect
import os
import platform
import re
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from tar import UserError, one_line
from tar.training.failure import STORES

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Process:
    """Where this process runs: its rank among world processes, its device and the type of the convolutions."""

    rank: int
    world: int
    device: torch.device
    amp: str
    control: object = None  # a process group of gloo, for what processes agree on without their cards
    signals: object = None  # StopSignals
    runs_ahead: float = 0.0  # how many times the next run's length all runs of a demonstration take, until that is said

    @property
    def main(self):
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def about(self):
        """What a figure depends on besides the settings: {name: value}."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else processor()
        about = {"device": name, "processes": self.world, "threads": torch.get_num_threads(), "amp": self.amp}
        return {**about, "torch": torch.__version__, "torchvision": torchvision.__version__}

    def say(self, text):
        """Prints a line once, above the progress bars."""
        if self.main:
            tqdm.write(text)

    def shared(self, value):
        """Rank 0's value, on every process."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box, 0, self.control)
        return box[0]

    def gathered(self, value):
        """The values of all processes, in the order of their ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value, self.control)
        return values

    def average(self, tensor):
        """The mean of a tensor over all processes."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor / self.world

    def any_process(self, flag):
        """Whether a flag is set in any process."""
        return any(self.gathered(flag))

    def on_main(self, call, *args, **kwargs):
        """A call by rank 0 only, which all others wait for. Returns its value on rank 0; its UserError rises on all."""
        value, error = None, None
        try:
            value = call(*args, **kwargs) if self.main else None
        except UserError as raised:
            error = raised
        if error := self.shared(error):
            raise error
        return value

    def main_first(self, call, *args, **kwargs):
        """A call by rank 0 first and the others after it: one download, and one line about what is wrong."""
        value = self.on_main(call, *args, **kwargs)
        return value if self.main else call(*args, **kwargs)

    def parallel(self, module):
        """A module whose gradients are averaged over all processes."""
        if self.world == 1:
            return module
        # Looking for unused parameters keeps DDP from rearranging its sums after the first step, so that a run that
        # goes on adds in the order of one that was left alone. Of two numbers the order does not matter, and on GPUs
        # the walk through the graph is not worth it.
        options = {"find_unused_parameters": self.device.type == "cpu" and self.world > 2}
        if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules()):
            known = inspect.signature(DistributedDataParallel).parameters  # torch 2.14 has another name for it
            options["forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"] = False
        return DistributedDataParallel(module, gradient_as_bucket_view=True, **options)

    def share_buffers(self, model):
        """Rank 0's batch-norm statistics on every process: each kept those of its own images."""
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)

    def autocast(self):
        """The context in which convolutions run in the chosen type."""
        return torch.autocast(self.device.type, TYPES.get(self.amp), enabled=self.amp != "none")

    def wait(self):
        """Until a GPU has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def place(self, model):
        """A model on the device, in the layout in which convolutions are fast."""
        return model.to(self.device, memory_format=torch.channels_last)

    def freeze(self, model):
        """Casts a frozen model's convolutions and layers once, as autocast would anew in every step: same numbers."""
        if self.amp != "none":
            for module in model.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.to(TYPES[self.amp])

    def progress(self, title):
        """A wrapper for iterables that shows a bar on a terminal."""
        return lambda batches: tqdm(batches, title, leave=False, disable=not (self.main and sys.stderr.isatty()))


def set_up(device="auto", amp="auto", threads=0, deterministic=False):
    """Joins the other processes if torchrun started this one; the Process. UserError: a device that is not there.

    The arguments are device_flags()'s; of "cuda" each of torchrun's processes takes its own card.
    """
    rank, world, control, limit = 0, 1, None, timedelta(hours=2)  # the others wait while rank 0 downloads
    together = "RANK" in os.environ
    if together:
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
        # torchrun may keep the store of a group that it starts again: no addresses of the dead must be found there
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        STORES.append(store)
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    device = kinds[-1] if device == "auto" else device
    if together and device.startswith("cuda:"):
        raise UserError(f"--device {device}: under torchrun each process takes its own card; give --device cuda")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first GPU is spoken to
        torch.use_deterministic_algorithms(True)
    try:
        device = torch.device(device)
        if device.type not in kinds:
            raise RuntimeError(f"only {' and '.join(kinds)}")
        if device.type == "cuda":
            torch.cuda.set_device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device}: not available here ({one_line(error)})") from None
    if together:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
        control = dist.new_group(backend="gloo", timeout=limit)
    if threads:
        torch.set_num_threads(threads)
    if amp == "auto":
        amp = "bf16" if has_bf16(device) else "none"
    if amp != "none" and device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # what stays float32 is multiplied as TF32
    return Process(rank, world, device, amp, control)


def processor():
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return names[0].strip() if names else platform.machine()


def has_bf16(device):
    """Whether the processor multiplies bfloat16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
