"""GPUs that this torch cannot use are said in one line, with the command that helps."""

import os

import pytest
import torch

from lavin.runtime import device
from lavin.runtime.errors import UserError
from user_errors import error_message

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]  # as torch's CUDA 13 wheels say
CUDA_12 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A function that pretends that there is a GPU of a capability, and a torch of these architectures."""
    def pretend(capability, architectures):
        for name, value in (("is_available", True), ("device_count", 1), ("get_arch_list", architectures),
                            ("get_device_name", "Tesla V100-SXM2-32GB"), ("set_device", None)):
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(device, "compute_capability", lambda _: capability)
    return pretend


@pytest.mark.parametrize("architecture, capability, expected", [
    ("sm_70", (7, 0), True), ("sm_70", (7, 5), True), ("sm_75", (7, 0), False), ("sm_80", (8, 9), True),
    ("sm_80", (9, 0), False), ("sm_90a", (9, 0), True), ("sm_120", (12, 0), True), ("sm_100", (10, 3), True),
    ("sm_90a", (9, 1), False), ("compute_90a", (10, 0), False),
    ("compute_75", (9, 0), True), ("compute_90", (8, 0), False), ("gfx90a", (9, 0), False)])
def test_which_gpus_run_the_code_of_an_architecture(architecture, capability, expected):
    """CUDA's rule: machine code runs on later minor versions, PTX on anything later."""
    assert device.runs_on(architecture, capability) == expected


@pytest.mark.parametrize("capability, architectures", [((7, 0), CUDA_12), ((7, 5), CUDA_13), ((12, 1), CUDA_13)])
def test_supported_gpus(gpu, capability, architectures):
    gpu(capability, architectures)
    assert device.choose_device(None, 0) == GPU


def test_a_gpu_without_kernels_is_refused_with_the_command_that_helps(gpu):
    gpu((7, 0), CUDA_13)
    message = error_message(device.choose_device, "cuda", 0)
    assert "no kernels for Tesla V100-SXM2-32GB (compute capability 7.0" in message and "\n" not in message
    assert message.endswith("pip install -r requirements.txt -c requirements/constraints/v100.txt")
    gpu((10, 0), CUDA_12)
    assert error_message(device.choose_device, None, 0).endswith("pip install --upgrade torch")


@pytest.fixture
def gpus_without_torch(monkeypatch, tmp_path):
    """A machine with two GPUs, of which torch sees none."""
    for name in ("nvidia0", "nvidia1", "nvidiactl"):
        (tmp_path / name).touch()
    monkeypatch.setattr(device, "NVIDIA_DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize("built_for, words", [("13.0", "requirements/constraints/cuda12.txt"),
                                              (None, "built for CPUs only")])
def test_a_gpu_that_torch_cannot_use_is_not_left_alone_in_silence(gpus_without_torch, monkeypatch, built_for, words):
    monkeypatch.setattr(torch.version, "cuda", built_for)
    message = error_message(device.choose_device, None, 0)
    assert "this machine has a GPU" in message and words in message and "--device cpu" in message
    assert device.choose_device("cpu", 0) == torch.device("cpu")


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles", "void"])
def test_gpus_that_a_job_was_not_given_are_left_alone(gpus_without_torch, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert device.choose_device(None, 0) == torch.device("cpu")


def test_gpus_without_device_files_are_left_alone(gpus_without_torch, monkeypatch, tmp_path):
    """Containers lack these files, and so do jobs on a GPU node that asked for none."""
    monkeypatch.setattr(device, "NVIDIA_DEVICES", tmp_path / "nowhere")
    assert device.choose_device(None, 0) == torch.device("cpu")


@pytest.mark.parametrize("capability, fix", [((3, 7), "take --device cpu"), ((10, 0), "pip install --upgrade torch")])
def test_gpus_that_no_constraint_helps(gpu, capability, fix):
    gpu(capability, CUDA_12)
    assert error_message(device.choose_device, None, 0).endswith(fix)


def test_builds_for_amd_are_not_checked(gpu, monkeypatch):
    gpu((9, 0), ["gfx90a"])
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert device.choose_device(None, 0) == GPU


def test_bf16_needs_ampere(gpu):
    gpu((7, 0), CUDA_12)
    assert device.choose_dtype("auto", GPU) == torch.float16
    assert "--precision bf16 needs" in error_message(device.choose_dtype, "bf16", GPU)
    gpu((8, 0), CUDA_12)
    assert device.choose_dtype("auto", GPU) == device.choose_dtype("bf16", GPU) == torch.bfloat16


def test_sums_of_fp16_products_stay_in_float32(gpu):
    gpu((7, 0), CUDA_12)
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = True
    device.choose_device(None, 0)
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction


@pytest.mark.parametrize("capability, cuda, used", [
    ((9, 0), "13.0", True), ((9, 0), "12.8", False), ((9, 0), None, False), ((8, 0), "13.0", False),
    ((12, 0), "13.0", False)])
def test_dependent_launches_where_they_were_measured(gpu, monkeypatch, capability, cuda, used):
    """None: ROCm's builds, whose GPUs have capabilities of their own."""
    gpu(capability, CUDA_13)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    device.pdl_options.cache_clear()
    expected = {"USE_PDL": True, "launch_pdl": True} if used else {"USE_PDL": False}  # Triton may not know launch_pdl
    assert device.pdl_options(GPU) == expected
    device.pdl_options.cache_clear()


@pytest.mark.parametrize("name", ["tpu", "cuda:9"])
def test_unknown_devices_are_refused(gpu, name):
    gpu((7, 0), CUDA_12)
    with pytest.raises(UserError):
        device.choose_device(name, 0)


# --- Threads ---

@pytest.fixture
def threads(monkeypatch):
    """The list of the numbers of threads that torch is told: 16 at first, in a process that may use 12 cores."""
    told = [16]
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: told[-1])
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    return told


@pytest.mark.parametrize("environment, on_cpu, on_gpu", [
    ({}, 12, 1), ({"LOCAL_WORLD_SIZE": "4"}, 3, 1), ({"LOCAL_WORLD_SIZE": "64"}, 1, 1),
    ({"OMP_NUM_THREADS": "5"}, 16, 16),  # by which torch has set its own number
    ({"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "4"}, 16, 16)], ids=str)
def test_threads_by_device_and_processes_of_the_node(gpu, threads, monkeypatch, environment, on_cpu, on_gpu):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for _ in range(2):
        device.choose_device("cpu", 0)
        assert threads[-1] == on_cpu
    gpu((7, 0), CUDA_12)
    device.choose_device(None, 0)
    assert threads[-1] == on_gpu


def test_fewer_threads_than_cores_stay(threads):
    """MKL counts cores without their second threads."""
    threads.append(6)
    device.choose_device("cpu", 0)
    assert threads[-1] == 6
