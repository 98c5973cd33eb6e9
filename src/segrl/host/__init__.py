"""What segrl asks of the machine: signals, whole files, locks, digests, and which names a foreign file may give."""
