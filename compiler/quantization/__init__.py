"""`n3c quantize`: which formats, and the checkpoint that is written."""
