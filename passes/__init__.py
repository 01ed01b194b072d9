"""One pass a file; pipelines are short tuples in `pipelines.py`."""
