"""What to see of a lowered model without a GPU: a report on one rank, what a pass changed, and what this machine can run."""
