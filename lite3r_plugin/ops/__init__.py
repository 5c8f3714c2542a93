"""The operators. Each folder holds `naive.py`, plain torch and the definition, beside `kernels.py`, Triton.

`ops` imports nothing else of the package but its errors.
"""
