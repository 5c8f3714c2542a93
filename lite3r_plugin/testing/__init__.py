"""The conformance kit for model adapters: one call in a test tells whether an adapter describes its model rightly."""

from .adapter import TEST_CONFIG, AdapterReport, check_adapter

__all__ = ["TEST_CONFIG", "AdapterReport", "check_adapter"]
