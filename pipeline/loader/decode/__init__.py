"""Decoders of a stream: DALI, and PIL as the reference; and resizing."""
