"""The command line: options, output, exit codes; it alone prints and exits."""
