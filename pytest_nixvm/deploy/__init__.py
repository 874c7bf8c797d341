"""Deploying a machine to a host: what runs here, and the one actor that runs there."""
