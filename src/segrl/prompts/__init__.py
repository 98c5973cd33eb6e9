"""Text to mask prompts and back; pure."""
