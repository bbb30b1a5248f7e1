"""What a build needs of the machine, and a GPU that nobody would use without a word."""

import os
import platform
import sysconfig
from dataclasses import replace

import pytest

from tasks.runtime import machine
from tasks.runtime.errors import StageError
from tests.conftest import ENGINE, ROOT, run_stage, settings_of
from training.settings import TrainSettings

NVRM = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\n"
    "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
)


@pytest.mark.parametrize(
    ("environment", "there", "told"),
    [
        ({}, {"gcc"}, ""),
        ({}, {"clang"}, ""),
        ({}, {"cc"}, "need a C compiler: run apt-get install build-essential"),
        ({"CC": "icx"}, {"icx"}, ""),
        ({"CC": "icx"}, {"gcc"}, "CC = icx is not there; unset it, or apt-get install build-ess"),
    ],
)
def test_the_compiler_is_the_one_that_triton_takes(environment, there, told):
    said = machine.compiler(environment, lambda name: name if name in there else None)
    assert told in said
    assert bool(said) == bool(told)


def test_headers_are_looked_for_where_this_python_keeps_them(tmp_path):
    assert "Python.h: run apt-get install python3.12-dev" in machine.headers(tmp_path, "3.12")
    (tmp_path / "Python.h").touch()
    assert machine.headers(tmp_path, "3.12") == ""


@pytest.mark.parametrize(
    ("found", "processor", "told"),
    [
        ("glibc 2.31", "x86_64", ""),
        ("glibc 2.100", "x86_64", ""),
        (
            "glibc 2.28",
            "x86_64",
            "need glibc 2.31 and this system has glibc 2.28; use one as new as",
        ),
        ("", "x86_64", "this system has none"),
        ("glibc 2.31", "aarch64", "need glibc 2.34"),
        ("glibc 2.36", "aarch64", ""),
        ("glibc 2.36", "riscv64", "no wheels for riscv64"),
    ],
)
def test_the_c_library_must_be_as_new_as_the_wheels(found, processor, told):
    said = machine.c_library(found, processor)
    assert told in said
    assert bool(said) == bool(told)


@pytest.mark.parametrize(
    ("command", "kernel", "version"),
    [
        ("580.65.06\n580.65.06\n", "", "580.65.06"),
        ("NVIDIA-SMI has failed because it couldn't communicate", NVRM, "570.86.10"),
        ("", NVRM, "570.86.10"),
        ("", NVRM.replace("Open Kernel Module for x86_64", "x86_64 Kernel Module"), "570.86.10"),
        ("", "", ""),
    ],
)
def test_the_driver_tells_its_version_in_two_places(command, kernel, version):
    assert machine.driver_version(command, kernel) == version


@pytest.mark.parametrize(
    ("version", "cuda", "told"),
    [
        ("580.65.06", 13000, ""),
        (
            "570.86.10",
            12080,
            "driver 570.86.10 is too old for CUDA 13: install driver 580 or newer",
        ),
        ("570.86.10", 13000, ""),  # with the compatibility package
        (
            "580.65.06",
            0,
            "but no libcuda.so.1: run apt-get install libcuda1, or start the container",
        ),
        ("", 12080, "the NVIDIA driver here is too old"),
    ],
)
def test_what_counts_of_a_driver_is_the_cuda_it_supports(version, cuda, told):
    said = machine.driver(version, cuda)
    assert told in said
    assert bool(said) == bool(told)


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        ("0,1", ["0", "1"]),
        (" 2 , 3", ["2", "3"]),
        ("", []),
        ("-1", []),
        ("1,-1,0", ["1"]),
        ("NoDevFiles", []),
        ("GPU-8f2,GPU-9c1", ["GPU-8f2", "GPU-9c1"]),
    ],
)
def test_gpus_are_those_that_cuda_would_show(monkeypatch, visible, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.gpus() == found


def test_all_that_is_missing_is_said_at_once_and_only_to_the_build_that_needs_it(
    monkeypatch, capsys
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(machine, "installed_driver", lambda: "550.54.14")
    monkeypatch.setattr(machine, "supported_cuda", lambda: 12040)
    monkeypatch.setattr(machine, "GLIBC", {platform.machine(): (9, 99)})
    monkeypatch.setattr(sysconfig, "get_paths", lambda *_: {"include": "/nowhere"})
    assert machine.main("cuda") == 4
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in said] == [True] * 4
    assert [word for word in ("glibc", "compiler", "Python.h", "driver") if word in "".join(said)] == [
        "glibc", "compiler", "Python.h", "driver"
    ]  # fmt: skip
    assert len(machine.missing("cpu")) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert len(machine.missing("cuda")) == 3, "nothing is asked of a driver where no GPU is"


@pytest.fixture
def unseen_gpu(monkeypatch):
    """A GPU that torch does not see; on a machine without any, torch itself says so."""
    torch = pytest.importorskip("torch")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_gpu_that_torch_does_not_see_is_told_with_what_to_do(unseen_gpu, monkeypatch):
    import torch

    assert machine.unseen() == (
        "CUDA_VISIBLE_DEVICES = 0, and torch sees no such GPU; unset it or correct it"
    )
    monkeypatch.setattr(machine, "gpus", lambda: ["0"])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(machine, "installed_driver", lambda: "550.54.14")
    monkeypatch.setattr(machine, "supported_cuda", lambda: 12040)
    with pytest.raises(
        StageError,
        match=r"does not see the GPU.*550\.54\.14 is too old for CUDA 13.*DEVICES= to work",
    ):
        machine.check_gpu()
    monkeypatch.setattr(machine, "supported_cuda", lambda: 13010)
    assert "supports CUDA 13.1 and torch" in machine.unseen()
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is a build without CUDA; run make setup DEVICE=cuda" in machine.unseen()
    monkeypatch.setattr(machine, "gpus", lambda: [])
    machine.check_gpu()


def test_a_gpu_that_is_listed_but_cannot_be_used_is_not_seen(monkeypatch):
    import torch

    monkeypatch.setenv(
        "PYTORCH_NVML_BASED_CUDA_CHECK", "1"
    )  # as vLLM sets it for all who import it
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_getDeviceCount", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert torch.cuda.is_available(), "what is to be guarded against"
    assert "torch sees no such GPU" in machine.unseen()
    assert os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] == "1"


@pytest.mark.parametrize("backend", ["vllm", "ray", "transformers"])
def test_no_engine_falls_back_to_the_cpu(unseen_gpu, tmp_path, backend):
    from tasks.engines.backends import open_engine

    with pytest.raises(StageError, match="torch does not see the GPU of this machine"):
        open_engine(tmp_path, replace(ENGINE, backend=backend))


def test_vllms_cpu_build_is_not_used_beside_a_gpu(monkeypatch):
    from tasks.engines import vllm

    monkeypatch.setattr(vllm.metadata, "distribution", lambda name: name)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(
        StageError, match="vLLM's CPU build on a machine with a GPU: run make setup"
    ):
        vllm.on_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not vllm.on_gpu()


def made(name: str, output, **trl):
    """TRL's configuration with these options, by one of the two functions that make it."""
    from training.loop import trl_settings

    train = settings_of(
        TrainSettings, trl=trl, steps=2, questions_per_step=4, num_generations=2,
        save_steps=2, micro_batch_size=8, watch_every=0,
    )  # fmt: skip
    return getattr(trl_settings, name)(output, train, total_steps=2, seed=0)


def test_a_disk_without_room_is_told_before_anything_is_installed():
    assert machine.room("cpu", 9 * 10**9, False) == ""
    said = machine.room("cuda", 3 * 10**9, False)
    assert said.startswith("the packages of this build take 14 GB and this disk has 3.0 GB free")
    assert machine.room("cuda", 0, True) == "", "they are there already"


@pytest.mark.parametrize("name", ["grpo_config", "sft_config"])
def test_training_does_not_fall_back_to_the_cpu_unless_it_is_told_to(
    unseen_gpu, tmp_path, capsys, name
):
    with pytest.raises(StageError, match="torch does not see the GPU of this machine"):
        made(name, tmp_path, bf16=False, use_vllm=True)
    assert made(name, tmp_path, use_cpu=True).n_gpu == 0
    assert 'train: on the CPU beside a GPU, since [Train] trl has "use_cpu": true' in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("name", ["grpo_config", "sft_config"])
def test_without_a_launcher_the_first_of_several_gpus_trains(monkeypatch, tmp_path, capsys, name):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # none is really there
    config = made(name, tmp_path)
    assert config.n_gpu == 1
    assert config.train_batch_size == config.per_device_train_batch_size
    said = capsys.readouterr().out
    assert "train: on the first of 4 GPUs; [Train] launcher puts a process on each" in said
    recipe = said.split("as in ")[1].strip()
    assert (ROOT / recipe).is_file()


def test_a_base_policy_is_not_taught_on_the_cpu_beside_a_gpu(unseen_gpu, tmp_path):
    from training.sft import base_policy

    given = {
        "model": "tiny", "download": [], "split": [], "card": "beetles", "seed": 0, "steps": 5,
        "prompt_style": "brief", "batch_size": 2, "learning_rate": 0.1, "muon_learning_rate": 0.0,
        "question_share": 0.5, "blind_share": 0.5, "min_pixels": 784, "max_pixels": 784,
        "dtype": "float32",
    }  # fmt: skip
    with pytest.raises(StageError, match="torch does not see the GPU of this machine"):
        run_stage(base_policy, tmp_path, **given)
