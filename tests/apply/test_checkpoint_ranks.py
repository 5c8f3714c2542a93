"""Models whose weights are spread over processes: gathered, written once, and nobody waits for one that has failed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HELPERS = Path(__file__).parents[1] / "helpers"
SCRIPT = """
import json, os, sys
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from lite3r_plugin import apply_lite3r, load_lite3r, save_lite3r
from lite3r_plugin.adapter import plugins
from lite3r_plugin.apply import checkpoint
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.errors import CheckpointError
from lite3r_plugin.testing import TEST_CONFIG
from toys import Adapter, Toy, images, toy_answer

rank, folder, said = int(os.environ["RANK"]), sys.argv[1], {}
plugins.get_manager().register(Adapter(toy_answer), name="toy")
# A file, since nobody knows of a port whether it is still free when it is wanted.
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
world = torch.distributed.get_world_size()

def dense():
    torch.manual_seed(0)
    return Toy().eval()

def applied(value=0.5):
    model = apply_lite3r(dense(), TEST_CONFIG)
    for module in lite3r_modules(model).values():
        nn.init.constant_(module.proj_lin.weight, value)
    return model

def sharded(mesh=None):
    model = applied()
    mesh = mesh or init_device_mesh("cpu", (world,))
    for module in (*model.frame, *model.cross):
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)

def message(call):
    try:
        call()
    except (CheckpointError, OSError) as error:
        return str(error)
    return "nothing was raised"

def full(path):
    raise OSError(28, "No space left on device")

want = applied()(images())
for whole in (False, True):
    save_lite3r(sharded(), f"{folder}/{whole}", whole=whole)
    other = load_lite3r(Toy().eval() if whole else dense(), f"{folder}/{whole}")
    assert torch.equal(other(images()), want), whole
said["into shards"] = message(lambda: load_lite3r(fully_shard(dense(), mesh=init_device_mesh("cpu", (world,))), f"{folder}/True"))
said["failed"] = message(lambda: save_lite3r(sharded(), __file__ if rank == 1 else f"{folder}/failed"))
real = checkpoint.replacing
if rank == 0:
    checkpoint.replacing = full
said["writer"] = message(lambda: save_lite3r(sharded(), f"{folder}/writer"))
checkpoint.replacing = real
said["part"] = message(lambda: save_lite3r(sharded(init_device_mesh("cpu", (world, 1), mesh_dim_names=("a", "b"))["b"]), folder))
model = nn.parallel.DistributedDataParallel(applied())
if rank == 0:
    save_lite3r(model, f"{folder}/one")  # the others are not asked
torch.distributed.barrier()
assert torch.equal(load_lite3r(dense(), f"{folder}/one")(images()), want)
for original in (True, False):
    model = FullyShardedDataParallel(applied(), use_orig_params=original, device_id=torch.device("cpu"))
    said[f"flat {original}"] = message(lambda: save_lite3r(model, f"{folder}/flat {original}"))
    said[f"flat whole {original}"] = message(lambda: save_lite3r(model, f"{folder}/flat {original}", whole=True))
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        save_lite3r(model, f"{folder}/flat {original}", whole=original)
    torch.distributed.barrier()
    other = load_lite3r(Toy().eval() if original else dense(), f"{folder}/flat {original}")
    assert torch.equal(other(images()), want), original
torch.distributed.destroy_process_group()
print(json.dumps(said))
"""


WORLD = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def said(folder: Path) -> list[dict[str, str]]:
    """The errors of each process, by what it did."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(HELPERS)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", script, folder], env={**environment, "RANK": str(rank), "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(WORLD)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * WORLD, outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]  # the lines before are those of gloo, which torch 2.9 lets talk


pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
    pytest.mark.slow,
]


def test_shards_are_gathered_and_whoever_is_asked_of_a_replicated_model_writes(said: list[dict[str, str]], folder: Path) -> None:
    """The processes have compared what they loaded with what they saved."""
    for name in ("True", "False", "one", "flat True", "flat False"):
        assert sorted(path.name for path in (folder / name).iterdir()) == ["lite3r.safetensors", "lite3r_config.json"]


def test_shards_are_not_loaded_into(said: list[dict[str, str]]) -> None:
    assert {each["into shards"] for each in said} == {"this FSDPToy is sharded: call load_lite3r first, and fully_shard then"}


def test_who_fails_tells_the_others(said: list[dict[str, str]], folder: Path) -> None:
    first, second = (each["failed"] for each in said)
    assert "nothing was saved, because save_lite3r failed on rank 1: CheckpointError" in first
    assert "is a file; save_lite3r takes a directory" in second
    assert not (folder / "failed").exists()


def test_who_writes_tells_the_others(said: list[dict[str, str]]) -> None:
    first, second = (each["writer"] for each in said)
    assert "No space left on device" in first
    assert "nothing was saved, because save_lite3r failed on rank 0: OSError: [Errno 28]" in second


def test_shards_of_some_processes_alone_are_refused(said: list[dict[str, str]]) -> None:
    assert all("is a DTensor of 1 of 2 processes: give a model that is not sharded" in each["part"] for each in said)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("whole", ["", "whole "])
def test_flattened_weights_are_refused(said: list[dict[str, str]], whole: str, original: bool) -> None:
    for each in said:
        assert "a shard, not a weight: call save_lite3r inside of `with FullyShardedDataParallel.summon" in each[f"flat {whole}{original}"]
