"""Triton twin of `ops.sla.naive`: kernels and their launches, over tokens that are in order and padded with zeros to whole query blocks.

    operands.py           what a launch takes: one call of the operator as its kernels see it
    forward.py            one kernel for the sparse softmax, the means of marginal blocks and the linear branch
    softmax.py            what it is made of: the softmax of a tile of queries; means in the form that kernels read
    linear.py             the feature map; the linear state over all tokens, or of each key block
    marginal.py           sums of states over the marginal pairs of a query block and a key block
    linear_pairs.py       the linear branch over all tokens with a mask: what of it has no states
    backward.py           all launches of the backward pass, in order
    softmax_backward.py   gradients of the sparse softmax and of the means
    linear_backward.py    gradients of the linear branch, and what the softmax's backward needs of each query
    backward_options.py   tiles, warps and pipeline stages of the backward kernels; those of others stand beside them

It imports triton; what does not run on a GPU must not import it.
"""
