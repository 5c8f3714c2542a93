"""Data sets of posed and unposed photographs, read into one form: images, depth and cameras of S views of a scene.

    scenes = open_scenes("blendedmvs:~/data/BlendedMVS", split="test")
    views = scenes[0].sample(pick_views(scenes[0], 8, "covisible", seed=0), size=(518, 518)).relative()

| layout | what | depth | published split |
| --- | --- | --- | --- |
| blendedmvs | BlendedMVS, low resolution | yes | yes |
| dtu | DTU, or anything in MVSNet's layout | where there are depth maps | yes |
| dtu-idr | DTU with ``cameras_sphere.npz`` | no | yes |
| 7scenes | 7-Scenes | yes | yes |
| strecha | fountain, Herz-Jesus, ... with ``.camera`` files | no | no |
| colmap | COLMAP models, undistorted | where there are depth maps | no |
| nerfstudio | nerfstudio and NeRF, ``transforms.json`` | where there are depth maps | no |
| images | a folder of photographs | no, nor cameras | no |
| procedural | rendered, no files | yes | yes |

Whatever a loader leaves out, or chooses among several, is a `DataWarning`; what is damaged, or no camera, pose, depth or mask, is an
`lite3r_plugin.errors.InputError` that names the file. Images and masks are paired with cameras by names or numbers.
"""

from ..reading import DataWarning, Limits, limits
from .layouts import LAYOUTS, open_scenes
from .sampling import ViewSets, pick_views
from .scene import Frame, Scene, Scenes, Views

__all__ = ["LAYOUTS", "DataWarning", "Frame", "Limits", "Scene", "Scenes", "ViewSets", "Views", "limits", "open_scenes", "pick_views"]
