"""How good a reconstruction is: depth, pose and points against a reference, and fidelity to a dense teacher.

    from lite3r_plugin.scene.metrics import Comparison, Geometry

    comparison = Comparison()
    for reference, dense, lite3r in scenes:                      # three `Geometry` objects
        comparison.add(reference, {"dense": dense, "lite3r": lite3r})
    rich.print(comparison.table("dense", "lite3r"))              # with a constant prediction beside, and 95 % intervals

Every measure takes one scene of S views as torch tensors of any device and returns Python floats. Cameras are world to camera,
OpenCV (x right, y down, z forward), ``[S, 3, 4]`` or ``[S, 4, 4]``; depth is z, in any unit, with 0 or NaN where unknown. World
frames and units of the two sides need not agree. AUC is in percent, angles in degrees, other shares between 0 and 1, lengths in
the unit of the reference. What cannot be measured is NaN, and None in `to_dict`; input that makes no sense is an `InputError`.
"""

from ..geometry import Geometry
from .alignment import Similarity, fit_similarity
from .bootstrap import Interval, paired_bootstrap
from .comparison import Comparison
from .depth import DepthMetrics, depth_metrics
from .fidelity import Fidelity, fidelity
from .points import PointMetrics, cloud_metrics, point_metrics
from .pose import PairErrors, PoseMetrics, auc, pair_errors, pose_metrics, published_auc
from .scene import SceneMetrics, constant_geometry, scene_metrics

__all__ = [
    "Comparison",
    "DepthMetrics",
    "Fidelity",
    "Geometry",
    "Interval",
    "PairErrors",
    "PointMetrics",
    "PoseMetrics",
    "SceneMetrics",
    "Similarity",
    "auc",
    "cloud_metrics",
    "constant_geometry",
    "depth_metrics",
    "fidelity",
    "fit_similarity",
    "pair_errors",
    "paired_bootstrap",
    "point_metrics",
    "pose_metrics",
    "published_auc",
    "scene_metrics",
]
