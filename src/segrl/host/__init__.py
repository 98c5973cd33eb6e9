"""The host machine: signals, whole files, locks, digests, and checks of foreign data."""
