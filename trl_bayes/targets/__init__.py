"""Targets: which posterior to approximate. Each turns rewards into log-evidence phi; none knows a trainer."""

from .base import Target
from .build import build_target
from .constraint import Constraint
from .product import Product
from .tilt import Tilt


__all__ = ["Constraint", "Product", "Target", "Tilt", "build_target"]
