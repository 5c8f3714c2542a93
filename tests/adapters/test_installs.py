"""What a model's install line names is enough to build it, and everything it names is needed."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from lite3r_plugin.adapter.plugins import find_model

PROBE = """
import importlib.metadata, re, sys, warnings
import torch
from packaging.requirements import Requirement
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.errors import InputError

warnings.simplefilter("ignore")
linspace = torch.linspace
torch.linspace = lambda *args, **kwargs: linspace(*args, **{**kwargs, "device": "cpu"})  # constructors read numbers off it
entry, named = find_model(sys.argv[1]), sys.argv[2:]
plain = lambda name: re.sub("[-_.]+", "-", name).lower()
waiting, allowed = [Requirement(name) for name in ("lite3r-plugin", *named)], {plain(entry.library)}
while waiting:
    requirement = waiting.pop()
    if plain(requirement.name) in allowed:
        continue
    allowed.add(plain(requirement.name))
    try:
        needs = importlib.metadata.requires(requirement.name) or []
    except importlib.metadata.PackageNotFoundError:  # on other systems
        continue
    waiting += [r for r in map(Requirement, needs) if r.marker is None or r.marker.evaluate({"extra": ""})]
owners = {}
for one in importlib.metadata.distributions():  # packages_distributions of Python 3.10 knows only some
    for file in one.files or ():
        owners.setdefault(file.parts[0].partition(".")[0], set()).add(plain(one.metadata["Name"]))


class Hiding:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        own = owners.get(name.partition(".")[0])
        return self.finder.find_spec(name, path, target) if own is None or own & allowed - {hidden} else None


sys.meta_path[:] = map(Hiding, sys.meta_path)
for hidden in (*named, None):
    for name in [name for name in sys.modules if name.partition(".")[0] in (entry.library, *named)]:
        del sys.modules[name]
    try:
        entry.build("random", "meta")
        print("built")
    except InputError as error:
        print(error)
"""
LINE = re.compile(r"pip install ([a-z ]+)$")


@pytest.mark.parametrize("name", ["da3-small", "da3-giant", "da3nested-giant-large", "vggt", "pi3"])
def test_what_the_install_line_names_is_enough_and_needed(name: str) -> None:
    """In a process that finds lite3r-plugin, the model's library, what the line names, what these need, and nothing else."""
    entry = find_model(name)
    if not entry.available:
        pytest.skip(f"{entry.library} is not installed")
    packages = "".join(LINE.findall(entry.install)).split()
    done = subprocess.run([sys.executable, "-c", PROBE, name, *packages], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *refused, whole = [line for line in done.stdout.splitlines() if line == "built" or line.startswith("the ")]
    assert whole == "built"
    assert len(refused) == len(packages)
    for package, error in zip(packages, refused, strict=True):
        assert f"imports {package!r}, which is not installed: install it, or all that the model needs: {entry.install}" in error
