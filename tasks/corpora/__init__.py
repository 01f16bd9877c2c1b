"""Sources of documents: files of users and publishers, and the standard library of every Python. Needs no SeqIO."""
