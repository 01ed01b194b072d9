"""`n3c bench`: how fast an engine runs a build."""
