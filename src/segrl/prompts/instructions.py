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

# What a sample without a query asks for, in the grammars below.
NO_QUERY = "the primary object"

# SAM-R1 (arXiv 2505.22596), figure 1, odd punctuation theirs; the example answer is not printed there: its shape is
# that of the figure's outputs, its numbers are neutral.
SAM_R1_USER = (
    'Please find the bounding box (bbox) and points containing "{Question}". Compare the differences between objects, locate, '
    "and identify the most closely matched target object. Output the thinking process within <think> </think> tags, and the "
    "final answer within <answer> </answer> tags. Output the bounding box that exactly contains the target object, and output "
    "some points to help better locate the object within the bounding box. For the points within the bounding box:Points of "
    "the target object are marked with 1. Points within the bounding box but not part of the target object are marked with 0. "
    "The points are represented as [x1, y1, value],Please output in JSON format, for example, <think> here is the thinking "
    "process </think> To generate the mask of the target object, "
    '<answer>{"bbox":[10,100,200,210],"points":[[30,110,1],[35,180,1]]}</answer>'
)

# Seg-Zero at commit 77f9ea5; spaces missing there, too.
SEG_ZERO_USER = (
    "Please find '{Question}' with bbox and points.Compare the difference between objects and find the most closely matched "
    "one.Output the thinking process in <think> </think> and final answer in <answer> </answer> tags.Output the one bbox and "
    "points of two largest inscribed circles inside the interested object in JSON format.i.e., <think> thinking process here "
    "</think><answer>{'bbox': [10,100,200,210], 'points_1': [30,110], 'points_2': [35,180]}</answer>"
)

# VisionReasoner.
VISION_REASONER_USER = (
    'Please find "{Question}" with bboxs and points.Compare the difference between object(s) and find the most closely matched '
    "object(s).Output the thinking process in <think> </think> and final answer in <answer> </answer> tags.Output the bbox(es) "
    "and point(s) inside the interested object(s) in JSON format.i.e., <think> thinking process here </think><answer>"
    '[{"bbox_2d": [10,100,200,210], "point_2d": [30,110]}, {"bbox_2d": [225,296,706,786], "point_2d": [302,410]}]</answer>'
)
