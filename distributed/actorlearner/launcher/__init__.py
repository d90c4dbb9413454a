"""Runs all roles of one experiment on this machine. Imports nothing heavy, so that roles start immediately."""
