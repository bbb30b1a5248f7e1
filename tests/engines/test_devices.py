"""How many worker processes a machine gets, and which GPUs each of them sees."""

import os
from dataclasses import replace

import pytest

from tasks.engines.pool import device_groups
from tasks.runtime.errors import StageError
from tests.conftest import ENGINE


def test_every_gpu_gets_a_process_and_tensor_parallelism_takes_several(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,5")
    settings, policy = replace(ENGINE, backend="vllm"), tmp_path
    assert device_groups(settings, policy) == ["0", "1", "2", "3", "5"]
    assert device_groups(replace(settings, tensor_parallel_size=2), policy) == ["0,1", "2,3"]
    assert device_groups(replace(settings, processes=3), policy) == ["0", "1", "2"]
    with pytest.raises(StageError, match="tensor_parallel_size = 8, but there are 5 GPUs"):
        device_groups(replace(settings, tensor_parallel_size=8), policy)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_groups(replace(settings, backend="server", processes=2), policy) == ["", ""]


def test_without_a_gpu_cores_and_free_memory_set_the_number_of_engines(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("tasks.runtime.memory.available", lambda: 100 * 2**30)
    settings = replace(ENGINE, backend="vllm", cpu_kv_cache_gib=1)

    def engines(threads: str) -> int:
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        return len(device_groups(settings, tmp_path))

    assert [engines("1"), engines("3"), engines("16")] == [8, 2, 1]
    assert device_groups(replace(settings, processes=3), tmp_path) == ["", "", ""]
    monkeypatch.setattr("tasks.runtime.memory.available", lambda: 10 * 2**30)
    assert engines("1") == 2
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(7 * 2**30)  # sparse
    assert engines("1") == 1
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert len(device_groups(settings, tmp_path)) == 1
