"""The choice of formats under a budget of bits, by what each costs the model."""
