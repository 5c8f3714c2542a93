"""When an approximation pays on this machine: what attention and Linears cost, measured once."""
