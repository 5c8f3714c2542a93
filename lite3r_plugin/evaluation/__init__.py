"""Running models and comparing what they predict: on this stand the command line and the benchmarks.

    import rich
    from lite3r_plugin import Lite3RConfig
    from lite3r_plugin.adapter.plugins import find_model
    from lite3r_plugin.evaluation import ModelPair, compare
    from lite3r_plugin.scene.data import open_scenes

    pair = ModelPair.build(find_model("testbed"), Lite3RConfig(keep_ratio=0.25, dense_below=0))
    found = compare(pair, open_scenes("procedural:scenes=8"), views=8)
    rich.print(found.table())

Nothing here prints: `compare` tells its progress to a function, and what libraries print is kept off the screen.
"""

from .compare import DENSE, LITE3R, Evaluation, ModelPair, compare, model_inputs, sample_views
from .protocol import PROTOCOLS, Protocol, ProtocolName, find_protocol
from .run import Run, choose_device, choose_dtype, merge, quiet, run_model, why_dense

__all__ = [
    "DENSE",
    "LITE3R",
    "PROTOCOLS",
    "Evaluation",
    "ModelPair",
    "Protocol",
    "ProtocolName",
    "Run",
    "choose_device",
    "choose_dtype",
    "compare",
    "find_protocol",
    "merge",
    "model_inputs",
    "quiet",
    "run_model",
    "sample_views",
    "why_dense",
]


def __dir__() -> list[str]:
    return sorted(__all__)  # what completion offers
