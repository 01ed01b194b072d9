"""The driver and the command line; the only folder that sees all others."""
