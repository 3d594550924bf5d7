"""What torch.distributed.checkpoint is told of a save: which shards this rank holds, and how they and the index are written."""

from __future__ import annotations

import dataclasses
import math
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, create_default_local_save_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter
from torch.distributed.checkpoint.utils import find_state_dict_object
from torch.distributed.tensor import DTensor
from torch.futures import Future

from lmforge.parallel.engine.shares import share
from lmforge.training.state.index import INDEX, SUFFIX, read_index, sweep, sync, write_index
from lmforge.training.state.shards import DTYPES, Shard, write_shards
from lmforge.training.state.tree import Skeleton, merge


class Planner(DefaultSavePlanner):
    """DCP's planner, which writes each replica once and spreads them over the ranks; the tree beside the tensors travels with the plan."""

    def __init__(self, skeleton: Skeleton, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.skeleton = skeleton
        self.tensors = {name: _storable(name, value) for name, value in tensors.items()}
        self.scalars = [name for name, value in tensors.items() if value.dim() == 0]

    def create_local_plan(self) -> SavePlan:
        items = create_default_local_save_plan(dict(self.tensors), self.is_coordinator).items
        right = (_placed(item, self.tensors[item.index.fqn]) for item in items)
        self.plan = SavePlan([item for item in right if _has_values(item)], planner_data=(self.skeleton, self.scalars))
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        return find_state_dict_object(self.tensors, index)


def _storable(name: str, value: Tensor) -> Tensor:
    """The tensor, or one of a dimension for one of none, which has no place to be a shard of."""
    if value.dtype not in DTYPES or value.layout != torch.strided:
        raise TypeError(f"{name}: a training state cannot hold a {value.layout} tensor of {value.dtype}")
    if value.dim():
        return value
    return (value.to_local() if isinstance(value, DTensor) else value).detach().reshape(1)


def _placed(item: WriteItem, value: Tensor) -> WriteItem:
    """A DTensor's item as it lies: see `share`."""
    if not isinstance(value, DTensor):
        return item
    chunk = chunk_of(value)
    assert item.tensor_data is not None
    return dataclasses.replace(item, index=MetadataIndex(item.index.fqn, chunk.offsets), tensor_data=dataclasses.replace(item.tensor_data, chunk=chunk))


def chunk_of(value: DTensor) -> ChunkStorageMetadata:
    """Where this rank's part of it lies, as torch.distributed.checkpoint says it."""
    bounds = share(value)
    return ChunkStorageMetadata(torch.Size(one.start for one in bounds), torch.Size(one.stop - one.start for one in bounds))


def _has_values(item: WriteItem) -> bool:
    """False for the empty shard of a rank that has no row of a tensor that has some."""
    assert item.tensor_data is not None
    return math.prod(item.tensor_data.chunk.sizes) > 0 or math.prod(item.tensor_data.size) == 0


class Writer(StorageWriter):
    """A file of shards on each rank into a folder of their own, then on rank 0 the index. `staged` is set when the tensors may change again."""

    def __init__(self, folder: Path, step: int, stage: Callable[[str, Tensor], Tensor]) -> None:
        self.folder, self.step, self.stage = folder, step, stage
        self.staged, self.planned = threading.Event(), False
        self.shards: Path | None = None  # on rank 0 the new folder, until it is the state

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0: a folder that no state is in, and what is left of an interrupted save goes."""
        self.skeleton = merge([plan.planner_data[0] for plan in plans])
        self.scalars = {name for plan in plans for name in plan.planner_data[1]}
        self.folder.mkdir(parents=True, exist_ok=True)
        index = read_index(self.folder)
        last = index["folder"] if index else ""
        sweep(self.folder, keep=last)
        name = f"step-{self.step}"
        self.shards = self.folder / (name if name != last else f"{name}-again")
        self.shards.mkdir()
        return [dataclasses.replace(plan, storage_data=self.shards / f"rank-{rank:05}{SUFFIX}", planner_data=None) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[Any]:
        """This rank's file; what is gathered to rank 0 is its name, size and SHA-256."""
        self.planned = True
        with torch.no_grad():
            shards = [self._shard(item, planner) for item in plan.items]
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # copies to pinned memory do not wait
        self.staged.set()
        done: Future[Any] = Future()
        done.set_result([(plan.storage_data.name, write_shards(plan.storage_data, shards))] if shards else [])
        return done

    def _shard(self, item: WriteItem, planner: SavePlanner) -> Shard:
        assert item.tensor_data is not None
        data, chunk = planner.resolve_data(item), item.tensor_data.chunk
        assert isinstance(data, Tensor)
        value = self.stage(item.index.fqn, data.detach())
        return Shard(item.index.fqn, value.dtype, tuple(chunk.sizes), tuple(chunk.offsets), lambda: value)

    def finish(self, metadata: Metadata, results: list[Any]) -> None:
        """On rank 0, when every rank has written its file: the index, and with it the state, is the new one."""
        assert self.shards is not None
        sync(self.shards)
        sync(self.folder)
        tensors = {
            name: (str(held.properties.dtype).removeprefix("torch."), [] if name in self.scalars else list(held.size))
            for name, held in metadata.state_dict_metadata.items()
            if isinstance(held, TensorStorageMetadata)
        }
        files = dict(sorted(one for of_rank in results for one in of_rank))
        write_index(self.folder, {"step": self.step, "folder": self.shards.name, "files": files, "tensors": tensors, "tree": self.skeleton})
        sweep(self.folder, keep=self.shards.name)
        self.shards = None

    def discard(self) -> None:
        """Remove what a save that failed has written: it would take the room that the next one needs. Not what the index names by now."""
        if self.shards is None:
            return
        (self.folder / (INDEX + ".tmp")).unlink(missing_ok=True)
        index = read_index(self.folder)
        if index is None or index["folder"] != self.shards.name:
            shutil.rmtree(self.shards, ignore_errors=True)
