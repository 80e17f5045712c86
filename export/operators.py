"""How each operator that lowering leaves is written in ONNX, by the operator.

Our own say in their reference code (passes/ops.py) what they compute; a test holds each rule to it.
"""

from . import operators_images, operators_pytorch, operators_tokens
from .rules import Rules

RULES = Rules(operators_pytorch.RULES | operators_tokens.RULES | operators_images.RULES)
