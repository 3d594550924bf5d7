"""EXPLAIN: a plan as a person reads it, what two plans differ in, and how right it was. Text in, text out; no disk, no torch."""

from lmforge.explain.changes import changes, flatten
from lmforge.explain.diff import because, diff
from lmforge.explain.render import FLOPS, Status, details, flow, parent, render
from lmforge.explain.words import GIB, gib

__all__ = ["FLOPS", "GIB", "Status", "because", "changes", "details", "diff", "flatten", "flow", "gib", "parent", "render"]
