"""What a Program costs, counted from its graph as expressions in the batch size b and the sequence length s."""
