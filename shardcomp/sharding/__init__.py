"""How values and weights split over the tensor-parallel axis: rules for each operator, their propagation, and resharding."""
