"""Procedural scenes as a data set: ``procedural:scenes=16,views=8,size=224,seed=0,device=cpu``.

The last quarter is the test split; its textures are others than the training scenes'.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch

from ...errors import InputError
from ..procedural import ProcScenes, TextureBank
from ..reading import shown
from .scene import Frame, Scene, Scenes

DEFAULTS = {"scenes": 16, "views": 8, "size": 224, "seed": 0, "textures": 64}
DEVICES = ("cpu", "cuda")
TEST_TEXTURES = 77_777  # what the seed of the test scenes' textures is off by
ATTEMPTS = 8


def procedural(options: str) -> Scenes:
    """Scenes, each rendered when it is asked for: the same options give the same scenes.

    Args:
        options: ``name=number`` with commas between; names: scenes, views, size, seed, textures. ``device=cuda`` renders on the GPU,
            which is faster and gives other scenes than the CPU.

    Raises:
        InputError: an option is unknown or no number, or there is no GPU.
    """
    values, device = dict(DEFAULTS), "cpu"
    for option in filter(None, options.split(",")):
        name, _, value = option.partition("=")
        if name == "device":
            if value not in DEVICES or (value == "cuda" and not torch.cuda.is_available()):
                raise InputError(f"procedural scenes are rendered on the cpu, or on cuda where there is a GPU; got {option!r}")
            device = value
            continue
        if name not in DEFAULTS or not (value.isascii() and value.isdigit() and len(value) < 7):
            raise InputError(f"procedural scenes take {', '.join(f'{k}=NUMBER' for k in DEFAULTS)}; got {shown(option)!r}")
        values[name] = int(value)
    count = values.pop("scenes")
    if count < 1 or values["views"] < 2 or not 8 <= values["size"] <= 4096 or values["textures"] < 6:
        raise InputError(f"procedural scenes: scenes >= 1, views >= 2, size 8 to 4096, textures >= 6; got {options!r}")
    names = [f"procedural-{i:05d}" for i in range(count)]
    test = names[count - max(1, count // 4) :] if count > 1 else []
    return Scenes(names, partial(_render, values, device, frozenset(test)), test)


def _render(options: dict[str, int], device: str, test: frozenset[str], name: str) -> Scene:
    bank = _bank(options["textures"], device, options["seed"] + (TEST_TEXTURES if name in test else 0))
    seed = 1_000_003 * (options["seed"] + 1) + int(name.rpartition("-")[2])
    scenes = ProcScenes(bank, device, seed)
    for _ in range(ATTEMPTS):  # few scenes have a camera that finds no free place
        sample = {key: value[0].cpu() for key, value in scenes(1, options["views"], options["size"], options["size"]).items()}
        if sample["ok"].all():
            break
    else:
        raise InputError(f"{name}: no free place for {options['views']} cameras; take another seed")
    frames = tuple(
        Frame(f"{i:03d}", sample["rgb"][i], sample["K"][i].double(), sample["w2c"][i].double(), sample["depth"][i] * sample["valid"][i])
        for i in range(options["views"])
    )
    return Scene(name, frames, name)


@lru_cache(maxsize=4)
def _bank(textures: int, device: str, seed: int) -> TextureBank:
    return TextureBank.procedural(textures, 64, device, seed=seed)
