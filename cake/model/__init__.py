"""The mathematics of Llama: configuration, blocks, sampling, tokens. Knows nothing of networks."""
