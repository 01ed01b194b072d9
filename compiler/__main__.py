"""`python -m n3c.compiler`: the command line."""

from n3c.compiler.cli.main import main

main()
