"""The language of a text, by py3langid: naive Bayes over byte sequences, 140 languages (Lui and Baldwin, 2012)."""

import functools
import importlib
from collections.abc import Sequence
from typing import Any


def language(text: str, languages: Sequence[str] = ("en", "zh"), at_least: float = 0.65) -> str | None:
    """Removes text in other languages.

    Args:
      languages: ISO 639-1 codes.
      at_least: probability of the likeliest language; FineWeb (arXiv:2406.17557, section 3.1) has 0.65, with another
        classifier.
    """
    found, probability = _identifier().classify(text)
    if found not in languages:
        return f"language {found}"
    return None if probability >= at_least else f"language {found} with a probability under {at_least:g}"


def require_known(languages: Sequence[str]) -> None:
    """Raises ValueError if py3langid is not installed, or does not support one of the languages."""
    if unknown := [code for code in languages if code not in _identifier().labels]:
        raise ValueError(f"language: py3langid does not know {unknown[0]!r}: give a code of two letters, such as 'en'.")


@functools.cache
def _identifier() -> Any:
    try:
        langid = importlib.import_module("py3langid.langid")
    except ModuleNotFoundError as error:
        if error.name != "py3langid":
            raise
        raise ValueError("the step 'language' needs py3langid, which is not installed: pip install '.[prepare]'."
                         ) from None
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
