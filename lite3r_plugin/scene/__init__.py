"""Scenes of several views: geometry, images, data sets, measures, files for people. Nothing here knows attention.

S views with cameras come in two forms: `lite3r_plugin.scene.data.Views`, data, and `lite3r_plugin.scene.prediction.Prediction`, what a
model makes of them. Both give `lite3r_plugin.scene.geometry.Geometry`, which is what is measured. Batches for training are dicts of
tensors in the format of the renderer, `lite3r_plugin.scene.procedural.ProcScenes`, which `Views.as_sample` gives too.
"""
