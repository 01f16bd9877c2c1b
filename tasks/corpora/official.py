"""The study's instruction corpora by name; each is found in a folder by its publisher's file name.

  text.alpaca_gpt4_en   alpaca_gpt4_data.json
  text.alpaca_gpt4_zh   alpaca_gpt4_data_zh.json
  text.pclue            pCLUE_train.json, or else its parts pCLUE_train_*.json; 200,000 sampled
  code.codealpaca       code_alpaca_20k.json
  code.cosqa            cosqa-train.json
  code.mbpp             mbpp.jsonl

Files may be compressed. The mixture `paper_instructions` joins them as the study joins its 500,000 instructions.
"""

import fnmatch
import os
from collections.abc import Mapping
from typing import Any

from codellm_jax.contents import COMPRESSED, require_file, without_compression
from tasks.corpora.files import below, in_name_of
from tasks.corpora.specs import OFFICIAL, kind_of

MIXTURE = "paper_instructions"
# The paper's 454,000 instructions; the 150,000 of code are divided in proportion to the three sets, MBPP without the
# evaluated problems. In this package's runs the share of code is a separate setting, and these rates apply within text
# and within code; in plain SeqIO they apply across all corpora.
_CODE_SIZES = {"code.codealpaca": 20_022, "code.cosqa": 19_604, "code.mbpp": 254}
MIXTURE_RATES: dict[str, float] = {
    "text.alpaca_gpt4_en": 52_000,
    "text.alpaca_gpt4_zh": 52_000,
    "text.pclue": 200_000,
    **{name: round(150_000 * size / sum(_CODE_SIZES.values())) for name, size in _CODE_SIZES.items()},
}


def official_corpora(data_dir: str) -> dict[str, dict[str, Any]]:
    """Specs of all official corpora, by name; does not search for files."""
    return {name: {"official": name, "data_dir": data_dir} for name in OFFICIAL}


def resolve(spec: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Finds the files of an official corpus in its folder.

    Args:
      spec: a valid spec of the kind "official".
      name: the corpus's name in messages.

    Returns:
      A spec of another kind, which reads those files.

    Raises:
      OSError: the folder or the file does not exist, or cannot be read.
      ValueError: the same file exists more than once.
    """
    form = OFFICIAL[spec["official"]]
    kind, folder, wanted = kind_of(form), spec["data_dir"], file_names(spec["official"])
    try:
        files = below(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: {error}; set DATA_DIR to the one that holds {wanted}.") from None
    for pattern in form[kind]:
        if found := _files_named(pattern, files, name):
            return {**form, kind: found}
    raise FileNotFoundError(
        f"{name}: DATA_DIR {folder!r} holds no file {wanted} (nor one with {COMPRESSED}); put it there, or "
        "give the corpus its own line in CORPORA."
    )


def file_names(official_name: str) -> str:
    """The file names of an official corpus, for messages."""
    form = OFFICIAL[official_name]
    return " or ".join(form[kind_of(form)])


def _files_named(pattern: str, files: list[str], name: str) -> list[str]:
    found: dict[str, str] = {}
    for file in files:
        plain = without_compression(os.path.basename(file))
        if not fnmatch.fnmatchcase(plain, pattern):
            continue
        if plain in found:
            raise ValueError(
                f"{name}: DATA_DIR holds {plain} twice, {found[plain]} and {file}; remove one, or give the corpus "
                "its own line in CORPORA."
            )
        with in_name_of(name):
            require_file(file)
        found[plain] = file
    return sorted(found.values())
