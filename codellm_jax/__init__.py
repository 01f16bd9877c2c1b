"""At which training stage does code data help a language model reason?

Verbs (`train`, ...) stand on top; nouns lie in the rooms below: `mixture` (what is trained on), `model` (what is
trained), `runtime` (how it is trained). `cli` is the `t5x` command and the only importer of gin.
"""

__version__ = "0.1.0"
