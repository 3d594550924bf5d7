"""The front end: conf/ and what was typed become an Experiment. The only room that imports Hydra; it never imports torch."""

from lmforge.compose.app import App, Composed
from lmforge.compose.assemble import experiment

__all__ = ["App", "Composed", "experiment"]
