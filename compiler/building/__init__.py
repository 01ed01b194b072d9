"""`n3c build` and `n3c check`: what is asked, what must hold before, and the output directory."""
