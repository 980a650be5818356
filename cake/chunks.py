"""How many tokens travel together: a few of those that sessions generate, and prompts in chunks."""

LARGEST_CHUNK, SMALLEST_CHUNK = 512, 48
CHUNK_BESIDE_OTHERS = 32  # whose tokens wait for it in every stage
CHUNKS_PER_STAGE = 16  # filling and emptying the pipeline then takes a sixteenth of a prompt's time
SENT_AHEAD = 2  # chunks of a prompt, beyond one in each stage
FEW_TOKENS = 16  # what a session that generates lacks at most, drafted tokens included


def chunk_tokens(n_tokens: int, n_stages: int) -> int:
    """Tokens of a chunk for a prompt of `n_tokens`."""
    if n_stages == 1:
        return LARGEST_CHUNK
    share = -(-n_tokens // (CHUNKS_PER_STAGE * n_stages * 16)) * 16
    return min(max(share, SMALLEST_CHUNK), LARGEST_CHUNK)
