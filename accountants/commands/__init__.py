"""The subcommands of `python -m accountants`, and how their answers are shown."""
