"""The label store: all SQL of the product, and the service through which every rater works, human or simulated."""

from tastemaker.store.database import Store
from tastemaker.store.service import LabelService

__all__ = ["LabelService", "Store"]
