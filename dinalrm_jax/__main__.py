"""Lists the commands."""
