"""What the policy is told. One text for SFT, RL and evaluation: a policy is asked as it was trained."""

from __future__ import annotations

# Seg-R1, grpo.py:362-368 and 378-384 (system and user message of the RL stage).
SEG_R1_SYSTEM = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
    "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer. "
    "The reasoning process should be enclosed within <think> </think>, and the bounding box, points and points labels "
    "within <bbox> </bbox>, <points> </points> and <labels> </labels>, i.e., "
    "<think> reasoning process here </think> <bbox>[x1,y1,x2,y2]</bbox>, <points>[[x3,y3],[x4,y4]]</points>, "
    "<labels>[1,0]</labels>. Where 1 indicates a foreground point and 0 a background point. "
    "Only generate a moderate number of points."
)
SEG_R1_USER = (
    "Identify and segment all the primary objects in the image. Output the result using the exact format: "
    "<think> reasoning process here </think> <bbox>[x1,y1,x2,y2]</bbox>, <points>[[x3,y3],[x4,y4]]</points>, "
    "<labels>[1,0]</labels>."
)
# Seg-R1 asks for one expression with these words in its referring evaluation.
SEG_R1_REFER = "Identify and segment {query}."

# Seg-R1, grpo_prerl.py:283-294 (no system message of its own).
SEG_R1_POINTS_USER = (
    "Generate a sparse set of point prompts to help segment the most salient object in the image. "
    "Include both foreground and background points, and only a moderate number of them. "
    "Output the result using the exact format: <points>[[x1,y1],[x2,y2]]</points> <labels>[1,0]</labels>, "
    "where 1 indicates a foreground point and 0 a background point."
)
