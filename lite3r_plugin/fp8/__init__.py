"""FP8 Linears: found in the transformer blocks, trained with fake quantisation, converted, run by one of several backends."""
