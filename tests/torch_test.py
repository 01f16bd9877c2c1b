"""The same small decoders trained in PyTorch, from the same weights on the same batches; skipped where it is absent."""

import functools
import math

import jax
import numpy as np
import pytest

from codellm_jax.mixture.batches import global_batch
from codellm_jax.model.decoder import Decoder, DecoderConfig
from codellm_jax.runtime.optimization import adamw, warmup_cosine
from codellm_jax.runtime.partitioning import MeshShape, batch_sharding, make_mesh
from codellm_jax.runtime.state import abstract_state, initial_state
from codellm_jax.training.plan import make_plan
from codellm_jax.training.train import train_step

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
F = torch.nn.functional
STEPS, PEAK, FINAL, WARMUP = 20, 3e-3, 1e-4, 5


def forward(p, batch, config):
    """PanGu-alpha or a GPT, written from the study's description; `p` maps our parameter paths to tensors."""
    inputs, positions, segments = (torch.tensor(np.asarray(x)).long() for x in
                                   (batch.inputs, batch.positions, batch.segment_ids))
    length = inputs.shape[1]
    mask = (torch.ones(length, length).tril().bool() & (segments[:, :, None] == segments[:, None, :]))[:, None]

    def norm(x, name, index=None):
        scale, bias = p[f"{name}/scale"], p[f"{name}/bias"]
        return F.layer_norm(x, (config.hidden,), scale if index is None else scale[index],
                            bias if index is None else bias[index], eps=1e-5)

    def block(x, name, index=None, query=None):
        def pick(part):
            return p[f"{name}/{part}"] if index is None else p[f"{name}/{part}"][index]

        h = norm(x, f"{name}/attention_norm", index)
        q, k, v = ((source @ pick(f"attention/{part}_kernel")).unflatten(-1, (config.heads, -1)).transpose(1, 2)
                   + pick(f"attention/{part}_bias")[None, :, None] for part, source in
                   (("query", h if query is None else query), ("key", h), ("value", h)))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(config.size_of_head)).masked_fill(~mask, -1e30)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + attended @ pick("attention/output_kernel") + pick("attention/output_bias")
        h = norm(x, f"{name}/feedforward_norm", index)
        h = F.gelu(h @ pick("feedforward/up_kernel") + pick("feedforward/up_bias"), approximate="tanh")
        return x + h @ pick("feedforward/down_kernel") + pick("feedforward/down_bias")

    x = p["token_embedding"][inputs] + p["position_embedding"][positions]
    for index in range(config.layers - config.query_layer):
        x = block(x, "blocks", index)
    x = norm(x, "final_norm")
    if config.query_layer:
        x = block(x, "query_block", query=p["query_embedding"][positions])
    logits = x @ p["token_embedding"].T
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), torch.tensor(np.asarray(batch.targets)).long().ravel())


@pytest.mark.parametrize("query_layer", [True, False])
def test_twenty_steps_agree_with_pytorch(query_layer, make_training):
    config = DecoderConfig(layers=3, hidden=32, heads=4, feedforward=64, vocabulary_size=8192, length=32,
                           query_layer=query_layer)
    training = make_training(train_steps=STEPS)
    mixture = make_plan(training).mixture
    mesh, shape = make_mesh(MeshShape(), jax.devices()[:1]), MeshShape()
    model = Decoder(config)
    optimizer = adamw(warmup_cosine(PEAK, FINAL, WARMUP, STEPS))
    state = initial_state(model, optimizer, abstract_state(model, optimizer, mesh, shape), seed=0)
    leaves = {"/".join(key.key for key in path): np.array(leaf)
              for path, leaf in jax.tree_util.tree_leaves_with_path(state.params)}
    tensors = {name: torch.tensor(leaf, requires_grad=True) for name, leaf in leaves.items()}
    plain = [t for name, t in tensors.items() if name.endswith(("bias", "scale"))]
    decayed = [t for name, t in tensors.items() if not name.endswith(("bias", "scale"))]
    theirs = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
                               lr=PEAK, betas=(0.9, 0.95), eps=1e-8)
    step_fn = jax.jit(functools.partial(train_step, model=model, optimizer=optimizer, sources=2))
    for step in range(STEPS):
        batch, _ = global_batch(step, training.batch_size, mixture.order, mixture.training,
                                training.vocabulary.end_of_document_id, batch_sharding(mesh))
        state, metrics = step_fn(state, batch)
        cosine = 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))
        rate = PEAK * step / WARMUP if step < WARMUP else FINAL + (PEAK - FINAL) * cosine
        for group in theirs.param_groups:
            group["lr"] = rate
        loss = forward(tensors, batch, config)
        theirs.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tensors.values(), 1.0)
        theirs.step()
        assert float(metrics.loss) == pytest.approx(loss.item(), rel=2e-5), step
