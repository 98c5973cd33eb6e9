"""All that only makes the shipped nano weights."""
