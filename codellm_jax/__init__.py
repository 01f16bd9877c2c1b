"""At which training stage does code data help a language model reason?

Five packages answer one question each: `training`, `evaluation`, `study`, `report`, `pods`. Below them are `mixture`
(the training data), `model` (the decoder), `runtime` (devices, checkpoints, records) and `results` (scores and their
intervals). `cli` is the `t5x` command; only `configuration` imports gin.
"""

__version__ = "0.1.0"
