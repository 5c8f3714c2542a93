"""The side-by-side benchmark: stock model, strong dense baseline and Lite3R in one process on the same images."""

from .models import BenchModel, bench_models
from .records import Candidate, Cell, Report
from .runner import Bench
from .variants import VARIANTS, Variant

__all__ = ["VARIANTS", "Bench", "BenchModel", "Candidate", "Cell", "Report", "Variant", "bench_models"]
