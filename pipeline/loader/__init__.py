"""Every step: (index, plan) -> uint8 batches. Knows the index; knows nothing of training.

`plan` says which images a step sees and how they are cut; `source` brings their bytes; `stream` joins both and deals
with what can't be read; `dali` and `reference` decode.
"""
