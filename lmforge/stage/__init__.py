"""Stages: what trains a model, each a node that says what it consumes and what it makes."""
