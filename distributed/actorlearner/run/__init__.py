"""The files of a run: its directory, record, starts, policies and status."""
