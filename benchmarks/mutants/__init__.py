"""`make mutants`: change one point of the code at a time, and ask whether the tests notice."""
