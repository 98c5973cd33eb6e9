"""Trained nano weights, and `python -m segrl.assets`, which makes them anew."""
