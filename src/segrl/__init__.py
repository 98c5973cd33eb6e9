"""segrl teaches multimodal language models to segment, by reinforcement learning.

A policy reads an image and writes a mask prompt; a frozen SAM2 turns the prompt into a mask; the mask's
agreement with ground truth is the reward. Each room is one clause of that sentence, and imports only
rooms below it:

    7  train, evaluate, score, prepare, export, serve, track, chain      commands
    6  runs                        what commands share: Hydra
    5  tracking | nano             what is recorded; what makes the shipped weights
    4  stages                      ways of training: Lightning
    3  rollout | segmenter         sampling and scoring, joined through protocols
    2  rewards | metrics | data | models
    1  prompts | objectives | metrics.functional | geometry | models.kernels
    0  types, protocols, host
"""

__version__ = "0.1.0"
