"""One scene on several devices: each process holds some of the views, and attention over views sees those of all.

To be read in this order:

    spread.py        which views a process holds in the running forward, and tensors along views taken apart and put together
    group.py         the processes: what travels between them, with gradients, and how an error of one ends all
    rows.py          which process computes which query blocks, so that blocks are those of one process, and pinned ones are shared
    attention.py     attention of one site: sparse over gathered keys, dense along a ring
    trial.py         what else of a model lets views meet, found by running it
    model.py         `parallelize_views`
    launch.py        the processes of `torchrun`, for commands

What travels and what it costs: `lite3r_plugin.costs.views`, docs/parallel.md.
"""

from .launch import Place, launched
from .model import ViewParallel, parallelize_views
from .spread import view_counts

__all__ = ["Place", "ViewParallel", "launched", "parallelize_views", "view_counts"]
