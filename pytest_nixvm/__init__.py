"""pytest-nixvm."""
