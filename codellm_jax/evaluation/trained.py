"""A trained model on its devices, for evaluation and inference."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax
from flax import linen as nn
from jax.sharding import Mesh

from codellm_jax.evaluation.decoding import Generation, Piece, generate, stream
from codellm_jax.evaluation.sampling import Sampling
from codellm_jax.evaluation.scoring import Request, Scores, score_greedily
from codellm_jax.model.decoder import Decoder, DecoderConfig
from codellm_jax.runtime.compatibility import require_same_model
from codellm_jax.runtime.partitioning import MeshShape, batch_sharding, make_mesh
from codellm_jax.runtime.progress import say
from codellm_jax.runtime.state import abstract_state, require_memory
from codellm_jax.vocabulary import Vocabulary
from codellm_jax.weights.start import newest_record, restore_parameters


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The settings of a trained model.

    Attributes:
      path: a run directory, whose newest undamaged checkpoint is used, or published weights.
      vocabulary: the vocabulary that the model was trained with.
      model: makes the decoder's configuration when called with `vocabulary_size` and `length`.
      lengths: {"targets": the longest row in tokens}.
      mesh: devices along each axis.
    """

    path: str
    vocabulary: Vocabulary
    model: Callable[..., DecoderConfig]
    lengths: Mapping[str, int]
    mesh: MeshShape


class TrainedModel(NamedTuple):
    """Parameters on devices with their configuration; call its methods under its mesh and axis rules."""

    params: Any
    config: DecoderConfig
    vocabulary: Vocabulary
    mesh: Mesh

    def score(self, requests: Sequence[Request], batch_tokens: int) -> list[Scores]:
        """Log-likelihoods of continuations; see `scoring.score_greedily`."""
        return score_greedily(
            self.params, self.config, requests, batch_tokens=batch_tokens, sharding=batch_sharding(self.mesh))

    def write(
        self, prompts: Sequence[Sequence[int]], stops: Sequence[Sequence[str]], sampling: Sampling, seed: int,
        end_ids: Collection[int] = (), **options: Any,
    ) -> list[Generation]:
        """One answer per prompt, each until it contains one of its texts in `stops`, or until one of `end_ids` or an
        end of document is drawn; see `decoding.stream`.
        """
        return generate(self.params, self.config, prompts, sampling, seed,
                        **self._options(prompts, stops, sampling, end_ids), **options)

    def stream(
        self, prompts: Sequence[Sequence[int]], stops: Sequence[Sequence[str]], sampling: Sampling, seed: int,
        end_ids: Collection[int] = (), **options: Any,
    ) -> Iterator[Piece]:
        """Like `write`, but yields pieces as they are drawn."""
        return stream(self.params, self.config, prompts, sampling, seed,
                      **self._options(prompts, stops, sampling, end_ids), **options)

    def room(self, sampling: Sampling) -> int:
        """Positions reserved for an answer, at most half of all; a prompt that is too long loses its beginning."""
        return max(1, min(sampling.max_new_tokens, self.config.length // 2))

    def _options(
        self, prompts: Sequence[Sequence[int]], stops: Sequence[Sequence[str]], sampling: Sampling,
        end_ids: Collection[int] = (),
    ) -> dict[str, Any]:
        def stopped(row: int, ids: list[int]) -> bool:
            text = self.vocabulary.decode_after(prompts[row], ids)
            return any(word in text for word in stops[row])

        return {"stop_ids": {self.vocabulary.end_of_document_id, *end_ids}, "drawable": self.vocabulary.pieces,
                "sharding": batch_sharding(self.mesh), "stopped": stopped if any(stops) else None,
                "room": self.room(sampling)}


@contextlib.contextmanager
def trained_model(
    checkpoint: Checkpoint, report: Callable[[str], None] = say
) -> Iterator[tuple[TrainedModel, dict[str, Any]]]:
    """Opens a checkpoint: yields its model and its record, under its mesh and axis rules.

    Raises:
      FileNotFoundError, ValueError: in one line; there is no checkpoint, or it is of another vocabulary or model.
    """
    vocabulary = checkpoint.vocabulary
    model = Decoder(checkpoint.model(vocabulary_size=vocabulary.size, length=checkpoint.lengths["targets"]))
    require_same_model(newest_record(checkpoint.path)[1], vocabulary, model.config, checkpoint.path)
    mesh = make_mesh(checkpoint.mesh)
    abstract = abstract_state(model, optax.identity(), mesh, checkpoint.mesh)
    require_memory(abstract.params, "Parameters")
    with jax.set_mesh(mesh), nn.logical_axis_rules(checkpoint.mesh.all_rules()):
        params, record = restore_parameters(checkpoint.path, abstract.params, report=report)
        yield TrainedModel(params, model.config, vocabulary, mesh), record
