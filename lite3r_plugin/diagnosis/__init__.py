"""What a model does as it comes, and which steps of Lite3R would pay: `doctor`, which changes nothing."""

from .doctor import doctor
from .report import Diagnosis, Leak, Site, Step, Timing, Unread, ViewGrowth

__all__ = ["Diagnosis", "Leak", "Site", "Step", "Timing", "Unread", "ViewGrowth", "doctor"]
