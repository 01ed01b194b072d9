"""`n3c build` and `n3c check`: the request and its checks, the driver, and the output directory."""
