"""Damaged checkpoints: an error of the package and the model as it was, or a model that runs; soon, and without much memory.

``--fuzz-seconds`` makes it go on for longer, from another seed each time.
"""

from __future__ import annotations

import json
import math
import random
import resource
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import JSON, WEIGHTS, seal, snapshot
from safetensors.torch import load_file
from time_limits import bounded
from torch import Tensor, nn
from toys import Toy, images, toy_adapter

from lite3r_plugin import apply_lite3r, load_lite3r, save_lite3r
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.apply.seal import seals
from lite3r_plugin.errors import CheckpointError, Lite3RError
from lite3r_plugin.testing import TEST_CONFIG

__all__ = ["toy_adapter"]  # the fixture
pytestmark = pytest.mark.usefixtures("adapter")
KINDS = ("branches", "fp8", "whole", "whole fp8")
MEMORY = 2**30  # bytes that all of them may add to the process
SECONDS = 3.0  # of this process: another that is busy takes none of them
LEAST = 24  # damaged checkpoints, however slow the machine is
HUGE = (2**31, 2**63, 2**64, 10**400, -1, 0, 1e308, math.inf, math.nan, -0.0)
OTHER = (None, True, False, 0, 1, 1.0, "", "no", "1", [], {}, [[]], {"": None}, "x" * 100_000, "\ud800", "module.module", "../x", *HUGE)
DTYPES = (
    torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.int8, torch.int64, torch.complex64,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.uint8,
)  # fmt: skip


@pytest.fixture(params=[pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("fp8", "whole"))) for kind in KINDS])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    model = apply_lite3r(Toy().eval(), TEST_CONFIG, precision="fp8" if "fp8" in request.param else "full", keep_ratio={"*.0": 0.3})
    for module in lite3r_modules(model).values():
        if module.sparse:
            nn.init.normal_(module.proj_lin.weight)
    save_lite3r(model, tmp_path / "saved", whole="whole" in request.param)
    return tmp_path / "saved"


def fuzz(
    saved: Path, damage: Callable[[random.Random, Path], str], check: Callable[[Toy, str], str], config: pytest.Config, capsys: Any
) -> None:
    """Load what `damage` makes of copies of a checkpoint until time is up; `check` says what became of a model that was loaded."""
    seconds = config.getoption("--fuzz-seconds")
    seed = 0 if seconds is None else random.SystemRandom().randrange(2**32)
    rng, seen, folder = random.Random(seed), Counter[str](), saved.parent / "damaged"
    model = Toy().eval()
    before, memory = snapshot(model), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    end = time.process_time() + (SECONDS if seconds is None else seconds) / len(KINDS)
    while seen.total() < LEAST or time.process_time() < end:
        shutil.copytree(saved, folder, dirs_exist_ok=True)
        what = f"seed {seed}, number {sum(seen.values())}: {damage(rng, folder)[:300]}"
        try:
            with bounded(what):
                load_lite3r(model, folder)
            refusal = None
        except Lite3RError as error:
            refusal = error
        except BaseException as error:
            raise AssertionError(what) from error
        if refusal is None:
            seen[check(model, what)] += 1
            model = Toy().eval()
            before = snapshot(model)
            continue
        seen["refused" if isinstance(refusal, CheckpointError) else type(refusal).__name__] += 1
        assert len(str(refusal)) < 3000, what
        assert snapshot(model) == before, what
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - memory
    with capsys.disabled():
        sys.stdout.write(f"\n{saved.parent.name}: {sum(seen.values())} damaged checkpoints: {dict(seen)}, {added >> 20} MiB more\n")
    assert added < MEMORY
    assert seen["refused"] > 10


def test_bytes(saved: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> None:
    """Of the files as they are: what still loads is what was saved."""
    want = {name: tensor.clone() for name, tensor in load_lite3r(Toy().eval(), saved).state_dict().items()}
    stored = {f"{name}" for name in load_file(saved / WEIGHTS)}

    def damage(rng: random.Random, folder: Path) -> str:
        path = folder / rng.choice((JSON, WEIGHTS))
        data = bytearray(path.read_bytes())
        if path.name == WEIGHTS and rng.random() < 0.5:  # the header, most of which is numbers
            head = bytearray(data[: 8 + int.from_bytes(data[:8], "little")])
            rest = data[len(head) :]
        else:
            head, rest = data, bytearray()
        what = rng.choice((flip, flip, cut, insert, repeat, digits))(rng, head)
        path.write_bytes(head + rest)
        return f"{path.name}: {what}"

    def check(model: Toy, what: str) -> str:
        state = model.state_dict()
        assert all(torch.equal(bits(state[name]), bits(want[name])) for name in stored), what
        return "as saved"

    fuzz(saved, damage, check, pytestconfig, capsys)


def test_values(saved: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> None:
    """With checksums that match: what loads is finite."""

    def damage(rng: random.Random, folder: Path) -> str:
        record = json.loads((folder / JSON).read_text())
        tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
        what = ""
        for _ in range(rng.choice((1, 1, 1, 2, 5))):
            what += (swap_value if rng.random() < 0.6 else swap_tensor)(rng, record, tensors) + "; "
        if rng.random() < 0.8 and isinstance(record.get("tensors"), dict):
            record["tensors"] = seals(tensors)
        seal(folder, record, tensors)
        return what

    def check(model: Toy, what: str) -> str:
        parameters = [p for p in model.parameters() if p.dtype.is_floating_point]
        assert all(p.isfinite().all() for p in parameters), what
        assert lite3r_modules(model), what
        if max(p.detach().abs().max().item() for p in parameters) < 1e3 and "weight_scale" not in what:
            assert model(images()).isfinite().all(), what
        return "loaded"

    fuzz(saved, damage, check, pytestconfig, capsys)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def flip(rng: random.Random, data: bytearray) -> str:
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    data[place] ^= 1 << bit
    return f"bit {bit} of byte {place}"


def cut(rng: random.Random, data: bytearray) -> str:
    size = rng.randrange(len(data))
    del data[size:]
    return f"cut to {size} bytes"


def insert(rng: random.Random, data: bytearray) -> str:
    place, what = (
        rng.randrange(len(data)),
        rng.choice((b"\0", b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"-", b"\xff", b'"', b"}", b"1e999")),
    )
    data[place:place] = what
    return f"{what[:20]!r} at {place}"


def repeat(rng: random.Random, data: bytearray) -> str:
    a, b = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    data[a:a] = data[a:b]
    return f"bytes {a} to {b} again"


def digits(rng: random.Random, data: bytearray) -> str:
    """A number becomes another one."""
    places = [i for i, byte in enumerate(data) if byte in b"0123456789"]
    if not places:
        return flip(rng, data)
    place, number = rng.choice(places), rng.choice((b"0", b"9", b"-1", b"18446744073709551615", b"4294967296", b"1e308", b"true", b"null"))
    data[place : place + 1] = number
    return f"{number!r} at {place}"


def swap_value(rng: random.Random, record: Any, tensors: dict[str, Tensor]) -> str:
    """A value of the record becomes another one, of any type; it is taken out, or one is added."""
    path: list[Any] = []
    here = record
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return "nothing"
        key = rng.choice(keys)
        path.append(key)
        if not isinstance(here[key], (dict, list)) or not here[key] or rng.random() < 0.3:
            break
        here = here[key]
    value: Any = rng.choice((*OTHER, deep(rng)))
    action = rng.random()
    if action < 0.75:
        here[key] = value
    elif action < 0.9:
        del here[key]
    elif isinstance(here, dict):
        here[rng.choice(("x", "module", "", "cross.0", "a." * 1000))] = value
    else:
        here.append(value)
    return f"{path} is {str(value)[:50]!r} ({action:.2f})"


def swap_tensor(rng: random.Random, record: Any, tensors: dict[str, Tensor]) -> str:
    """A tensor becomes one of another dtype, shape, name or value."""
    if not tensors:
        return "nothing"
    name = rng.choice(list(tensors))
    tensor = tensors.pop(name)
    action = rng.randrange(6)
    if action == 0:
        tensor = tensor.to(torch.float32).to(rng.choice(DTYPES))
    elif action == 1:
        tensor = tensor.reshape(-1)[: rng.randrange(tensor.numel() + 1)].clone()
    elif action == 2:
        tensor = tensor[None].clone()
    elif action == 3:
        name = rng.choice(("x", "", "module." + name, "a." * 1000, name + ".weight_data", "cross.0.proj_lin.weight"))
    elif action == 4:
        return f"{name} is gone"
    else:
        value = rng.choice((math.nan, math.inf, -math.inf, 3e38, -1.0, 0.0, 1e-45))
        wide = tensor.to(torch.float32)
        wide.reshape(-1)[rng.randrange(max(1, wide.numel())) :][:1] = value
        tensor = wide.to(tensor.dtype)
    tensors[name] = tensor
    return f"{name}: change {action}, {tensor.dtype} {list(tensor.shape)}"


def deep(rng: random.Random) -> Any:
    """Lists or dicts in each other."""
    value: Any = 1
    for _ in range(rng.choice((2, 50, 500))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value
