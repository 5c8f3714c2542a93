"""The ways in which a site makes q, k and v and uses the output of attention: one class of `adapter.sites`, one style."""
