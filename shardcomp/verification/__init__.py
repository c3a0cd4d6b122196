"""A plan against the unmodified dense model: ranks as threads, gradients of both, mutants, and resumed runs."""
