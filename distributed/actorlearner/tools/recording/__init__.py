"""Videos of policies: saved policies that act, episodes that are recorded, and the files they go to."""
