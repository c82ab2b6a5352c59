"""One module per verb of the command line, each with `run(args) -> exit code`."""
