"""Agreement between masks."""
