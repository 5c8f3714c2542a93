"""The operators, a folder each: the definition in plain torch is its `naive.py`; the rest is how it gets fast.

    block_map       which key blocks each query block attends to
    qk_norm_rope    norm, rotary embedding, token order and pooling, the pass before attention
    sla             sparse-linear attention, the whole operator; uses the two above
    fp8             rows in FP8, and the operations that end in them
    weight_only     a Linear whose weight alone is in FP8
    feature_maps    passes over the feature maps of dense heads

Triton is in `kernels.py` and other files and folders whose names end with that word, with the signatures of the definition; they are
imported when they are to run. `dispatch.py` decides that, and registers operators for compilers; `options.py` holds the words and
ranges of options. Of the rest of the package `ops` imports its errors alone.
"""
