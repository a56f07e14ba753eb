"""The wire: schemas and their committed generated stubs, nothing else. `make protos` regenerates them."""
