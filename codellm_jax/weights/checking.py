"""Compares the logits of an imported run with those of transformers on the same files."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from codellm_jax.model.decoder import Decoder
from codellm_jax.runtime.checkpoints import restore_parameters
from codellm_jax.runtime.partitioning import MeshShape, make_mesh
from codellm_jax.runtime.progress import say
from codellm_jax.runtime.state import abstract_state
from codellm_jax.weights.importing import Source

TOLERANCE = 1e-3  # of logits, in float32
SENTENCES = (
    "The mixture of code and text decides what a language model learns before it is tuned.",
    "def area(width, height):\n    return width * height\n\n\nprint(area(3, 4))  # 12\n",
    "for (int i = 0; i < n; ++i) { total += values[i] * 0.5; }",
    "代码数据在哪个训练阶段帮助推理？ Ça dépend — “naïve” façade, 10 000 €.",
)


def require_transformers() -> Any:
    """The transformers library, which the comparison needs together with PyTorch. Raises ValueError if either is
    missing.
    """
    try:
        import torch as _  # noqa: F401
        import transformers
    except ImportError as error:
        raise ValueError(f"--check compares with transformers, but {error.name} is not installed: pip install torch "
                         "transformers, or omit --check.") from None
    return transformers


def largest_difference(source: Source, run: str, report: Callable[[str], None] = say) -> float:
    """The largest difference of logits between a run and transformers on the same files, over some sentences.

    Both hold the whole model in memory, in float32. No code of the folder is executed.

    Raises:
      ValueError: transformers or PyTorch is missing, or transformers does not support the family.
    """
    transformers = require_transformers()
    import torch

    config = source.config
    model = Decoder(config)
    shape = MeshShape(data=1)
    mesh = make_mesh(shape, jax.devices()[:1])
    params, _ = restore_parameters(run, abstract_state(model, optax.identity(), mesh, shape).params, report=report)
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            source.folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the library may raise any exception
        raise ValueError(f"transformers cannot open {source.folder}: {' '.join(str(error).split())[:200]}") from None
    theirs.eval()

    @jax.jit
    def compute(params: Any, tokens_BL: jax.Array, positions_BL: jax.Array) -> Any:
        hidden_BLD = model.apply({"params": params}, tokens_BL, positions_BL, jnp.zeros_like(tokens_BL))
        return model.apply({"params": params}, hidden_BLD, method="logits")

    largest = 0.0
    for sentence in SENTENCES:
        ids = [*source.vocabulary.begin_ids, *source.vocabulary.encode(sentence)][: config.length]
        tokens_1L = np.asarray([ids], np.int32)
        ours_1LV = np.asarray(compute(params, tokens_1L, np.arange(len(ids), dtype=np.int32)[None]))
        with torch.no_grad():
            theirs_1LV = theirs(torch.from_numpy(tokens_1L.astype(np.int64))).logits.float().numpy()
        largest = max(largest, float(np.abs(ours_1LV - theirs_1LV).max()))
    return largest
