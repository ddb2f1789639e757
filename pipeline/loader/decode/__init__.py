"""Decoders of a stream: DALI, parts of restart shards by torchvision.io, and PIL as the reference; and resizing."""
