"""One completion to one number per term; pure."""
