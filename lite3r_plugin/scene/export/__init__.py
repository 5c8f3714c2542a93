"""Files that people look at and other programs read: point clouds, cameras, pictures, pages."""

from .arrays import load_npz, save_npz
from .colmap import write_colmap, write_images
from .comparison import Column, save_comparison
from .formats import RECORD, check_out, load, picture_path, save
from .glb import extent, pyramids, save_glb
from .live import check_viewer, live_page
from .page import save_page
from .pictures import Panel, save_picture
from .point_cloud import PointCloud, point_cloud, render, save_ply, with_lines
from .reconstruction import Facts, Reconstruction
from .report import Report, facts_of_table, save_report
from .transforms import transforms

__all__ = [
    "RECORD",
    "Column",
    "Facts",
    "Panel",
    "PointCloud",
    "Reconstruction",
    "Report",
    "check_out",
    "check_viewer",
    "extent",
    "facts_of_table",
    "live_page",
    "load",
    "load_npz",
    "picture_path",
    "point_cloud",
    "pyramids",
    "render",
    "save",
    "save_comparison",
    "save_glb",
    "save_npz",
    "save_page",
    "save_picture",
    "save_ply",
    "save_report",
    "transforms",
    "with_lines",
    "write_colmap",
    "write_images",
]
