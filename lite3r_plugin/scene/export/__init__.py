"""Files that people look at: coloured point clouds and pictures of views and depth."""

from .pictures import Panel, save_picture
from .point_cloud import PointCloud, point_cloud, render, save_ply

__all__ = ["Panel", "PointCloud", "point_cloud", "render", "save_picture", "save_ply"]
