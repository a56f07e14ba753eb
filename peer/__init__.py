"""A member of the swarm: identity, records and directory, transport, hosting of experts."""
