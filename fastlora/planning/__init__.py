"""Arithmetic of a training run: memory, time, energy. Loads no model and needs no GPU."""

from .gpus import GPU, GPUS, Rate
from .shapes import SHAPES, Shape, shape_of
from .training_plan import TrainingPlan, plan

__all__ = ["GPU", "GPUS", "SHAPES", "Rate", "Shape", "TrainingPlan", "plan", "shape_of"]
