"""Procedural multi-view RGB-D scenes in plain torch: exact depth and cameras without a data set.

    bank = TextureBank.procedural(256, device="cuda", seed=0)
    scenes = ProcScenes(bank, "cuda", seed=1, compile=True)
    sample = scenes(B=8, V=4, H=224, W=224)

Training and test data differ in the seeds of the scenes and, for a harder split, of the texture bank.
"""

from .checks import covisibility, reprojection_check
from .render import ARCS, ProcScenes
from .room import furnished_room
from .textures import TextureBank

__all__ = ["ARCS", "ProcScenes", "TextureBank", "covisibility", "furnished_room", "reprojection_check"]
