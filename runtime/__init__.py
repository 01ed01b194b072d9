"""What runs a build: engines, generation, verification."""
