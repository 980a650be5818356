"""Models at rest: folders, the hub, bundles. Knows nothing of networks between nodes."""
