"""Cake runs large language models of the Llama 3 family across the devices a person already owns."""

__version__ = "0.1.0"
