"""The command `saelab` and its subcommands, one module for each group of them."""
