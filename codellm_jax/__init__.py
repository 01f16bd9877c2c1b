"""At which training stage does code data help a language model reason?

Five wings, one for each question: `training`, `evaluation`, `study`, `report`, `pods`. Below them lie `mixture` (what
is trained on), `model` (what is trained), `runtime` (how it is trained) and `results` (how sure a score is). `cli`
is the `t5x` command; `configuration` alone imports gin.
"""

__version__ = "0.1.0"
