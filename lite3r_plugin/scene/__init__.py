"""Scenes of several views: geometry, images, data sets, measures, files for people. Nothing here knows attention."""
