"""Two contestants side by side: each drives its own swarm in processes of its own, one turn at a time."""
