"""The command line. Heavy imports stand inside the commands, so that `ratchet --help` is quick."""
