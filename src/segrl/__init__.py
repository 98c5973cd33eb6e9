"""segrl teaches multimodal language models to segment, by reinforcement learning.

A policy reads an image and writes a mask prompt; a frozen SAM2 turns the prompt into a mask; the mask's
agreement with ground truth is the reward. Packages have levels; each imports only from lower levels:

    7  train, evaluate, score, prepare, export, serve, track, chain      commands
    6  runs                        code that the commands share; Hydra
    5  tracking | nano             logs and checkpoints; training of the shipped nano weights
    4  stages                      ways of training; Lightning
    3  rollout | segmenter         sampling; completions to masks
    2  rewards | metrics | data | models
    1  prompts | objectives | metrics.functional | geometry | models.kernels
    0  types, protocols, host
"""

__version__ = "0.1.0"
