"""The dialect of Anthropic's API: messages of blocks, whole and as a stream of events."""
