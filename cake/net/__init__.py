"""Connections between nodes. Knows the protocol, and nothing of models."""
