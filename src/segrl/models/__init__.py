"""Adapters to third-party weights."""
