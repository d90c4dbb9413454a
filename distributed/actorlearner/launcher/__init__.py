"""All roles of one experiment on this machine. Imports nothing heavy, so the roles start at once."""
