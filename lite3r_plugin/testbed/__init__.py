"""A small multi-view reconstruction model, trained on procedural scenes, on which changes of quality can be measured.

It has VGGT's structure at a hundredth of its size. Its absolute quality is that of a test model; what it shows is how much a
change of the attention or of the precision costs a *trained* model.
"""

from .model import Testbed, TestbedConfig, weights_hash

__all__ = ["Testbed", "TestbedConfig", "weights_hash"]
