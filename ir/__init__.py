"""The intermediate representation: types, ops, programs, diagnostics. Standard library only."""
