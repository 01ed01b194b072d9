"""Specs: schema, loader, pattern DSL, Hugging Face configs; and the shipped *.toml."""
