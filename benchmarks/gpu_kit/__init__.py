"""The parts of `gpu_parts.py`: what a GPU is asked at first contact."""
