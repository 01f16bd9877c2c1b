"""Where documents come from: files of users and publishers, and what every Python holds. Needs no SeqIO."""
