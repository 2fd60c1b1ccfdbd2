"""Guidance methods for `flowkit.attach`, one a file."""
