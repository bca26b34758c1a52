"""The `rlm` command: one file per subcommand."""
