"""Looks at what the other rooms make: before a job is queued, while it runs, and afterwards. Nobody imports it."""
