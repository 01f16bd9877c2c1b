"""`t5x prepare`: turns documents into training text by cleaning, deduplication, decontamination and sampling."""
