"""Equations of agreement; pure."""
