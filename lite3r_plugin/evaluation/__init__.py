"""Running models and comparing what they predict."""
