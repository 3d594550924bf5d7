"""What a step takes before it runs: bytes by part, FLOPs and seconds, from shapes, placement and machine. Nothing here imports torch."""
