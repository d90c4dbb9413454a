"""Videos of policies: loads saved policies, records episodes, and writes the files."""
