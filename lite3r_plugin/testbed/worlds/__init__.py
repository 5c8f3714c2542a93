"""Clips of textured worlds, maps and race tracks of free games, rendered without a display.

The worlds are no part of the package: a folder of packed ``*.npz`` files is given to the training. Rendering needs moderngl and an
EGL driver (`pip install "lite3r-plugin[worlds]"`).
"""

from .files import World, load_pictures, load_world
from .sampler import WorldSampler, world_stream

__all__ = ["World", "WorldSampler", "load_pictures", "load_world", "world_stream"]
