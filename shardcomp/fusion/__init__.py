"""Which subgraphs a fused kernel may replace: matchers find them, and equivalence with the kernel is proved by numbers."""
