"""What tests of distillation share: a toy with Lite3R, inputs, and the same run in processes of its own."""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from toys import Adapter, Toy, toy_answer

from lite3r_plugin import apply_lite3r, distill
from lite3r_plugin.adapter import plugins
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.training.distill import Distillation

FIELDS: dict[str, Any] = {"keep_ratio": 0.15, "block_q": 16, "block_k": 16, "pin": "special", "block_means": False}
VIEWS, SIZE = 3, 24


def toy() -> Toy:
    """The same each time; its values are large enough for attention to matter."""
    torch.manual_seed(0)
    made = Toy()
    with torch.no_grad():
        for attention in (*made.frame, *made.cross):
            attention.get_parameter("qkv.weight")[64:] *= 4
    return made


def sparse_toy(**fields: Any) -> Toy:
    """It with Lite3R; a registered adapter has to know it."""
    return apply_lite3r(toy(), **{**FIELDS, **fields})


def inputs(count: int = 5, views: int = VIEWS) -> list[Tensor]:
    """Unlike one another, ``[1, views, 3, 24, 24]`` each."""
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(1, views, 3, SIZE, SIZE, generator=generator) for _ in range(count)]


def metrics(folder: Path, name: str = "loss") -> dict[int, float]:
    """What a run logged of `name`, by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def logged(folder: Path, **fields: Any) -> dict[str, Any]:
    """Fields for a run that logs each step."""
    return {"output_dir": str(folder), "trackers": ("jsonl",), "log_every": 1, **fields}


def start(folder: Path, processes: int, *runs: dict[str, Any]) -> subprocess.Popen[str]:
    """Distil the toy in processes of their own, one run after another: each is fields for `run`, its metrics in a folder by its number.

    They come from one process, which has imported everything.
    """
    command = [sys.executable, __file__, str(folder), str(processes), json.dumps(runs)]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    # A session of its own, so that all of it can be killed.
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for what `start` started; its standard error."""
    try:
        _, error = process.communicate(timeout=300)
    except BaseException:
        kill(process)  # nothing else would end it
        raise
    assert process.returncode == 0, error[-3000:]
    return error


def kill(process: subprocess.Popen[str]) -> None:
    """Kill all processes of what `start` started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


class Slow(list[Tensor]):
    """A list that takes its time, so that there is some to kill who reads it."""

    def __getitem__(self, index: Any) -> Any:
        time.sleep(0.02)
        return super().__getitem__(index)


def run(folder: Path, *, shard: bool = False, lora: bool = False, **fields: Any) -> Distillation:
    """One run of the toy. `lora`: put in before; `shard`: by FSDP2 over all processes, a site at a time."""
    model = sparse_toy()
    if lora:
        from lite3r_plugin.peft import add_lora  # takes as long to import as all the rest

        torch.manual_seed(0)
        add_lora(model, rank=4)
    if shard:
        from accelerate import PartialState
        from torch.distributed.fsdp import fully_shard

        PartialState()
        for site in lite3r_modules(model).values():
            fully_shard(site)
        fully_shard(model)
    return distill(model, Slow(inputs()), **logged(folder, **fields))


def divide(processes: int) -> tuple[list[int], Any]:
    """Become so many processes, as a launcher would start them: where they meet is open from the start, lest others be given its port.

    Returns the others' numbers in the first one, nothing in these; and what the first one must keep as long as there are others.
    """
    door = socket.create_server(("127.0.0.1", 0))
    port = door.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    others = []
    for rank in range(1, processes):
        if (child := os.fork()) == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            door.close()
            return [], None
        others.append(child)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0"}
    options: dict[str, Any] = {"is_master": True, "wait_for_workers": False, "master_listen_fd": door.detach(), "use_libuv": False}
    return others, torch.distributed.TCPStore("127.0.0.1", port, processes, **options)


def leave(others: list[int]) -> NoReturn:
    """End one of the processes that `divide` made, the first one after the others."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # a process that ends with one may abort
    sys.exit(max([os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) for other in others], default=0))


if __name__ == "__main__":
    todo = json.loads(sys.argv[3])
    importlib.import_module("accelerate.data_loader")
    importlib.import_module("torch._dynamo")  # the first step of an optimizer imports it
    if any(one.get("lora") for one in todo):
        importlib.import_module("lite3r_plugin.peft")
    children, kept = divide(int(sys.argv[2])) if int(sys.argv[2]) > 1 else ([], None)
    plugins.get_manager().register(Adapter(toy_answer), name="toy")
    for number, one in enumerate(todo):
        run(Path(sys.argv[1]) / str(number), **one)
    leave(children)
