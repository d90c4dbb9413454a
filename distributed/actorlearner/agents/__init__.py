"""Algorithms: one file each, named only in gin files."""
