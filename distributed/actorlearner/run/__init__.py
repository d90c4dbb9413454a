"""What a run leaves behind: its directory, its record, its starts, its policies and its status."""
