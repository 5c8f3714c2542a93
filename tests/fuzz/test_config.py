"""Configurations of hostile values: each is taken, and then frozen, hashable and JSON, or refused by a `ConfigError` of one short line.

``--fuzz-seconds`` makes it go on for longer, from another seed each time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from lite3r_plugin import Lite3RConfig
from lite3r_plugin.errors import ConfigError

TRIES = 3_000
LONGEST_MESSAGE = 500
FIELDS = [field.name for field in dataclasses.fields(Lite3RConfig)]
WORDS = ["auto", "all", "none", "marginal", "softmax", "elu", "special", "reference", "naive", "triton", "full", "fp8", "te", "global"]
SIMPLE: list[Callable[[random.Random], Any]] = [
    lambda r: r.choice([None, True, False, 0, 1, -1, 16, 64, 128, 0.5, 1.0, -0.0, math.nan, math.inf, 1e-320, 2**63, 10**5000, 1j]),
    lambda r: r.choice([*WORDS, "", "*", "x" * 5000, "\0", "\ud800", b"auto"]),
    lambda r: r.random(),
    lambda r: r.randrange(-5, 300),
    lambda r: r.choice([np.float32(0.5), np.float64(0.5), np.int64(64), np.bool_(True), np.ones(r.randrange(3)), np.array(WORDS)]),
    lambda r: r.choice([torch.tensor(0.5), torch.ones(2), torch.zeros(0), torch.float32]),
    lambda r: r.choice([object(), range(3), Lite3RConfig(), iter(())]),
    lambda r: r.choice([int, len, lambda module, fqn: True]),
]


def value(r: random.Random, depth: int = 0) -> Any:
    kind = r.randrange(4 if depth < 2 else 1)
    many = range(r.randrange(4))
    if kind == 1:
        return r.choice([tuple, list])(value(r, depth + 1) for _ in many)
    if kind == 2:
        return {r.choice([*WORDS, "*", "a.b", 5, None, (1,)]): value(r, depth + 1) for _ in many}
    if kind == 3:
        return tuple(r.choices(["global", "frame", "encoder", "camera"], k=len(many)))
    return r.choice(SIMPLE)(r)


def check(fields: dict[str, Any], build: Callable[..., Lite3RConfig]) -> str:
    try:
        config = build(**fields)
    except ConfigError as error:
        return "refused" if len(str(error)) < LONGEST_MESSAGE and "\n" not in str(error) else f"refused, in many words: {error}"
    assert hash(config) == hash(config.replace())
    assert config == config.replace()
    if callable(config.fp8_filter):
        return "taken, with a function"
    text = json.dumps(config.to_dict(), allow_nan=False)
    assert Lite3RConfig.from_dict(json.loads(text)) == config
    return "taken"


def test_configurations(pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = pytestconfig.getoption("--fuzz-seconds")
    r, end = random.Random(0 if seconds is None else None), time.monotonic() + (seconds or 0)
    found: Counter[str] = Counter()
    builds: list[Callable[..., Lite3RConfig]] = [
        Lite3RConfig,
        Lite3RConfig().replace,
        lambda **fields: Lite3RConfig.from_dict({"version": 1} | fields),
    ]
    while found.total() < TRIES or time.monotonic() < end:
        fields = {name: r.choice([value(r), getattr(Lite3RConfig(), name)]) for name in r.sample(FIELDS, r.randrange(1, 4))}
        try:
            found[check(fields, r.choice(builds))] += 1
        except Exception as error:
            raise AssertionError(f"of the fields {list(fields)}: {[type(x) for x in fields.values()]}") from error
    with capsys.disabled():
        print(f"\nconfigurations: {dict(found)}")  # noqa: T201
    assert found.keys() == {"refused", "taken", "taken, with a function"}
    assert min(found["refused"], found["taken"]) > TRIES // 5
