"""Which linears bear few bits: sensitivity, the choice of formats under a budget, activation scales."""
