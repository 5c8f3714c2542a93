"""The side-by-side benchmark: stock model, strong dense baseline and Lite3R in one process on the same images."""

from .models import BenchModel
from .records import BenchReport, Candidate, Cell
from .runner import Bench
from .variants import VARIANTS, Variant

__all__ = ["VARIANTS", "Bench", "BenchModel", "BenchReport", "Candidate", "Cell", "Variant"]
