"""The resumable state of a run: sharded, readable by any number of ranks in any layout, and without pickle.

    state/index.json    what the files below are, each with its bytes and SHA-256, the step, and all of the state that is no tensor; written last
    state/step-120/     rank-00000.safetensors, ...: each rank's own shards, in the form of torch's HuggingFaceStorageReader
    state/model/        config and tokenizer, written once by `describe`: with the weights they make a Hugging Face folder (`release`)

The files are new ones at every save, the index is renamed into place after them, and the older folder goes after that. So a run killed at any
moment, or a full disk, leaves the last good state. Randomness and data order are functions of the step and need no state.
"""

from lmforge.training.state.about import MODEL, describe
from lmforge.training.state.exporting import release
from lmforge.training.state.index import read_index
from lmforge.training.state.read import OPTIMIZER, WEIGHTS, Held, Saved, check, open_state
from lmforge.training.state.saver import Saver
from lmforge.training.state.together import agree
from lmforge.training.state.tree import Path as TreePath
from lmforge.training.state.tree import tensors

__all__ = [
    "MODEL",
    "OPTIMIZER",
    "WEIGHTS",
    "Held",
    "Saved",
    "Saver",
    "TreePath",
    "agree",
    "check",
    "describe",
    "open_state",
    "read_index",
    "release",
    "tensors",
]
