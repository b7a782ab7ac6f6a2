"""Memory, disk, devices and rates: asked for before work starts."""

from __future__ import annotations

import functools
import os
import shutil
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub.constants
import psutil
import torch

from llm_surgeon.errors import InputError, first_line


@functools.cache
def matmul_rate(device: torch.device, dtype: torch.dtype = torch.float32, seconds: float = 0.1) -> float:
    """Floating point operations per second of a matrix product, measured once in a process."""
    size = 8192 if device.type == "cuda" else 512
    x = torch.randn(size, size, device=device, dtype=dtype)
    products = 0
    x @ x  # the first one also starts libraries up
    _synchronize(device)
    begun = time.perf_counter()
    while (elapsed := time.perf_counter() - begun) < seconds:
        x @ x
        _synchronize(device)
        products += 1
    return max(products, 1) * 2 * size**3 / elapsed


@functools.cache
def copy_rate(device: torch.device) -> float:
    """Bytes per second from pinned main memory to ``device``, measured once in a process."""
    source = torch.empty(2**26, dtype=torch.uint8, pin_memory=True)
    target = source.to(device)
    _synchronize(device)
    begun = time.perf_counter()
    for _ in range(4):
        target.copy_(source, non_blocking=True)
    _synchronize(device)
    return 4 * source.nbytes / (time.perf_counter() - begun)


def choose_device(name: str | None) -> torch.device:
    """The device called ``name``; without a name a GPU where there is one. :class:`InputError` if it cannot be used."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise InputError(f"device {name!r} cannot be used here: {first_line(error)}") from error


def available_memory(device: torch.device | str) -> int:
    """Bytes free on a GPU (those cached by PyTorch included), or in main memory for any other device.

    Main memory counts as far as the limits of the process allow: those of its control groups (containers, Slurm) and of
    its address space (``ulimit -v``).
    """
    device = torch.device(device)
    if device.type != "cuda":
        return max(0, min(psutil.virtual_memory().available, *_group_memory(), *_address_space()))
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _group_memory(root: Path = Path("/sys/fs/cgroup"), groups: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """Bytes left to each control group that the process is in, of version 1 or 2; caches that can go do not count."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # not on Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Within a container the path may be one of the host, which is not there: only the root is.
        group = Path(path.lstrip("/"))
        for folder in {top / each for each in (group, *group.parents)}:
            try:
                limit, used = ((folder / name).read_text().strip() for name in names[:2])
                counts = dict(line.split(" ", 1) for line in (folder / "memory.stat").read_text().splitlines())
            except OSError:  # no such group, or one without a limit of its own
                continue
            if limit != "max":
                yield int(limit) - int(used) + int(counts.get(names[2], 0))


def _address_space() -> Iterator[int]:
    """Bytes of addresses left to the process, where they are limited."""
    if sys.platform == "win32":
        return
    import resource  # not on Windows

    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        yield limit - psutil.Process().memory_info().vms


def peak_memory(device: torch.device) -> int:
    """Most bytes ever in use: allocated on a GPU since its statistics were reset, or by the process in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def process_memory() -> int:
    """Bytes of main memory that the process holds."""
    return psutil.Process().memory_info().rss


@contextmanager
def gpu_memory_capped(cap: int | None) -> Iterator[None]:
    """Context manager in which PyTorch takes no more than ``cap`` bytes of the current GPU; lifted on exit."""
    if cap is None or not torch.cuda.is_available():
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, cap / torch.cuda.mem_get_info()[1]))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def require_memory(needed: int, device: torch.device | str, purpose: str = "", *, processes: int = 1) -> None:
    """Raise :class:`InputError` where fewer than ``needed`` bytes, for ``purpose``, are available on ``device``.

    Main memory must have room for as many ``processes`` of this machine, GPUs for one.
    """
    available, in_all = available_memory(device), needed
    if torch.device(device).type != "cuda" and processes > 1:
        in_all, purpose = processes * needed, f"{purpose or 'the run'} in {processes} processes"
    if in_all > available:
        raise InputError(
            f"about {human_bytes(in_all)} of memory are needed on {device}{purpose and ' for ' + purpose} "
            f"and {human_bytes(available)} are available"
        )


def require_disk(out: str | Path, needed: int) -> None:
    """Raise :class:`InputError` where the disk that ``out`` will be on has fewer than ``needed`` bytes left."""
    folder = nearest_existing(Path(os.path.realpath(os.path.expanduser(out))))
    available = shutil.disk_usage(folder).free
    if needed > available:
        raise InputError(
            f"about {human_bytes(needed)} of disk are needed for {str(out)!r} and "
            f"{human_bytes(available)} are available in {str(folder)!r}"
        )


def nearest_existing(path: Path) -> Path:
    """``path`` or the nearest of its parents that exists."""
    return next(candidate for candidate in (path, *path.parents) if os.path.exists(candidate))


def human_bytes(count: int) -> str:
    """``count`` bytes for people, in powers of 1000: ``"13.5 GB"``."""
    value = float(count)
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if value < 999.5:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value * 1000:.0f} TB"


def hub_reachable(timeout: float = 5.0) -> bool:
    """True where the Hugging Face hub answers; asked once, for the hub's own retries take half a minute to give up."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=timeout):
            return True
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # someone answers; certificates are the real client's affair
    except OSError:
        return False


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
