"""Lightning strategies that run a mesh: one device and DDP, DTensors (FSDP2, tensor and pipeline parallel), DeepSpeed."""
