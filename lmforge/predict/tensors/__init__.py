"""Tensors of a step without torch: operations on a tape, decoder layers as their operations, and a layer walked forward and backward."""
