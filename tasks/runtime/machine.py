"""Checks the machine: what an installation needs of it, and whether torch sees its GPU.

    python -m tasks.runtime.machine cuda     before the installation, under a bare Python
    python -m tasks.runtime.machine torch    after the installation

Each problem is one sentence with the command that solves it.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

# The CUDA version that the wheels are built with, as cuDriverGetVersion counts: 1000 major + 10 minor.
CUDA = 13000
DRIVER = 580  # the first driver that supports it
GLIBC = {"x86_64": (2, 31), "aarch64": (2, 34)}  # the oldest glibc that all wheels support
# Bytes on the disk after an installation, measured; those of CUDA from the sizes of its wheels.
SIZE = {"cpu": 8e9, "cuda": 14e9}
NO_GPU = ("-1", "NoDevFiles", "none", "void")  # CUDA ignores CUDA_VISIBLE_DEVICES from these on


def gpus() -> list[str]:
    """This process's NVIDIA GPUs, as CUDA_VISIBLE_DEVICES names them. Needs no CUDA."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        named = [gpu.strip() for gpu in visible.split(",") if gpu.strip()]
        return named[: next((i for i, gpu in enumerate(named) if gpu in NO_GPU), None)]
    # CUDA counts from 0, whatever the numbers of the devices that a container was given.
    return [str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def compiler(
    environment: Mapping[str, str], which: Callable[[str], str | None] = shutil.which
) -> str:
    """The problem if there is no C compiler; "" if there is one.

    Triton compiles a launcher for each kernel at run time, with CC, gcc or clang.
    """
    if any(
        which(name) for name in ((environment["CC"],) if "CC" in environment else ("gcc", "clang"))
    ):
        return ""
    named = f"CC = {environment['CC']} is not there; unset it, or" if "CC" in environment else "run"
    return f"GPU kernels need a C compiler: {named} apt-get install build-essential"


def headers(include: Path, version: str) -> str:
    """The problem if the folder `include` holds no Python.h, which Triton's launchers include."""
    if (include / "Python.h").is_file():
        return ""
    return f"GPU kernels need {include / 'Python.h'}: run apt-get install python{version}-dev"


def c_library(reported: str, machine: str) -> str:
    """The problem if glibc is too old. `reported` is CS_GNU_LIBC_VERSION, such as "glibc 2.36"."""
    wanted = GLIBC.get(machine)
    if wanted is None:
        return f"there are no wheels for {machine}; use a machine with {' or '.join(GLIBC)}"
    number = re.fullmatch(r"glibc (\d+)\.(\d+)", reported)
    if number and tuple(map(int, number.groups())) >= wanted:
        return ""
    need = ".".join(map(str, wanted))
    return (
        f"the wheels need glibc {need} and this system has {reported or 'none'}; use one as new as "
        + (
            "Debian 11, Ubuntu 20.04 or RHEL 9"
            if machine == "x86_64"
            else "Debian 12, Ubuntu 22.04 or RHEL 9"
        )
    )


def driver(version: str, cuda: int) -> str:
    """The problem if the driver is too old for CUDA, or libcuda is missing.

    `version` is that of the kernel module, "" if unknown; `cuda` is what libcuda supports, 0 without
    it. The two differ under NVIDIA's compatibility package, and then libcuda decides.
    """
    if cuda >= CUDA:
        return ""
    if not cuda:
        return (
            f"there is a GPU (driver {version or 'unknown'}) but no libcuda.so.1: run apt-get install "
            "libcuda1, or start the container with --gpus all"
        )
    return (
        f"the NVIDIA driver {version or 'here'} is too old for CUDA 13: install driver {DRIVER} or newer "
        "(https://www.nvidia.com/drivers), or on a data-centre GPU run apt-get install cuda-compat-13-0"
    )


def driver_version(of_command: str, of_kernel: str) -> str:
    """The driver's version in the text of `nvidia-smi`, else of /proc/driver/nvidia/version, else ""."""
    match = re.search(r"^\d+\.[\d.]+$", of_command, re.MULTILINE) or re.search(
        r"(?<=\s)\d{3,}\.[\d.]+", of_kernel.partition("\n")[0]
    )
    return match.group() if match else ""


def installed_driver() -> str:
    """The version of this machine's driver; "" where there is none."""
    command_output = kernel_text = ""
    with suppress(OSError, subprocess.SubprocessError):
        command_output = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=60,
        ).stdout  # fmt: skip
    with suppress(OSError):
        kernel_text = Path("/proc/driver/nvidia/version").read_text()
    return driver_version(command_output, kernel_text)


def supported_cuda() -> int:
    """The CUDA version that libcuda supports, such as 13000; 0 without libcuda."""
    number = ctypes.c_int(0)
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    return number.value


def room(build: str, free: int, installed: bool) -> str:
    """The problem if the disk has fewer `free` bytes than a build's packages take."""
    if installed or free >= SIZE[build]:
        return ""
    needed, there = SIZE[build] / 1e9, free / 1e9
    return (
        f"the packages of this build take {needed:.0f} GB and this disk has {there:.1f} GB free; make "
        "room, or clone onto another disk"
    )


def missing(build: str) -> list[str]:
    """The problems of this machine for a build ("cpu" or "cuda"), one sentence each."""
    libc = ""
    with suppress(ValueError, OSError):
        libc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    schemes = sysconfig.get_default_scheme().replace(
        "posix_local", "posix_prefix"
    )  # as Triton does
    installed = any(Path(sys.prefix).glob("lib/python*/site-packages/torch"))
    problems = [
        c_library(libc, platform.machine()),
        room(build, shutil.disk_usage(sys.prefix).free, installed),
    ]
    if build == "cuda":
        problems += [
            compiler(os.environ),
            headers(
                Path(sysconfig.get_paths(schemes)["include"]), "{}.{}".format(*sys.version_info[:2])
            ),
            driver(installed_driver(), supported_cuda()) if gpus() else "",
        ]
    return list(filter(None, problems))


def unseen() -> str:
    """The reason why torch does not see this machine's GPU; "" where it does, or there is none."""
    if not gpus():
        return ""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; run make setup DEVICE=cuda"
    # vLLM makes torch ask the driver's management library, which also lists GPUs that CUDA cannot use.
    weaker = os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if torch.cuda.is_available():
                return ""
    finally:
        if weaker is not None:
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = weaker
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return (
            f"CUDA_VISIBLE_DEVICES = {visible}, and torch sees no such GPU; unset it or correct it"
        )
    version, cuda = installed_driver(), supported_cuda()
    reason = (
        str(caught[0].message).partition("\n")[0]
        if caught
        else "nvidia-smi should say what is wrong"
    )
    return driver(version, cuda) or (
        f"driver {version or 'unknown'} supports CUDA {cuda // 1000}.{cuda % 1000 // 10} and torch "
        f"{torch.__version__} is built for {torch.version.cuda}; {reason}"
    )


def check_gpu() -> None:
    """Raise StageError when torch does not see a GPU that is there: no stage uses the CPU unasked."""
    from tasks.runtime.errors import StageError

    if why := unseen():
        raise StageError(
            f"torch does not see the GPU of this machine: {why} (CUDA_VISIBLE_DEVICES= to work on the CPU)"
        )


def main(what: str) -> int:
    """Print the problems. Returns how many there are."""
    wrong = list(filter(None, [unseen()])) if what == "torch" else missing(what)
    for sentence in wrong:
        print(f"error: {sentence}", file=sys.stderr)
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
