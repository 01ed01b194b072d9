"""What a GPU shows: `python -m benchmarks gpu`, each part in a process of its own."""
