"""The order of tokens: the layout of a forward, found from its images, and the order in which blocks of tokens are image tiles."""
