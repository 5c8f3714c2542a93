"""The attention module that takes the place of a host's."""
