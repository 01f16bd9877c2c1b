"""The whole train step compared with peers, on the same batch in the same run.

    python -m benchmarks.step                   also needs torch (pip install torch), and a C++
                                                compiler for torch.compile
    python -m benchmarks.step --model=llama     also needs transformers

A decoder of 4 layers x 256, 4 heads, feed-forward 1024, vocabulary 8192, 8 x 256 tokens, float32, AdamW. It is a GPT,
or has Llama's parts (RMSNorm, rotary positions, SwiGLU, no biases, an untied head); "grouped" also has one head of keys
and values for two heads of queries.

  ours          train_step as `t5x train` runs it: shardings, document boundaries, losses per source, chunked loss;
                fed by the real pipeline of rows; with model.remat = 'none' and model.scan_unroll = 4
  plain flax    as Flax's lm1b example: linen's own attention, all logits held, one jit, one batch reused
  plain torch   a GPT as in nanoGPT: queries, keys and values in one projection, scaled_dot_product_attention, a tied
                head, AdamW that decays only matrices; one batch reused. "compiled torch" is the same under
                torch.compile, including the loss
  transformers  LlamaForCausalLM with scaled_dot_product_attention and the fused AdamW, one batch reused; "compiled" is
                the same under torch.compile, including the loss
  matmul        the rate of a plain JAX matmul on these cores: the step's matmuls at that rate are the floor

Each contender has its own process, and they take turns; the figure is the median step of each turn, the ratio is taken
within a turn, and the spread is that of the turns.
"""

import argparse
import functools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

LAYERS, HIDDEN, HEADS, FEEDFORWARD, VOCABULARY, BATCH, LENGTH = 4, 256, 4, 1024, 8192, 8, 256
LLAMA = {"norm": "rms", "positions": "rotary", "activation": "swiglu", "biases": "none", "tied_head": False}
MODELS: dict[str, dict[str, Any]] = {"gpt": {}, "llama": LLAMA, "grouped": LLAMA | {"kv_heads": HEADS // 2}}


def our_config(model: str) -> Any:
    from codellm_jax.model.decoder import DecoderConfig

    return DecoderConfig(layers=LAYERS, hidden=HIDDEN, heads=HEADS, feedforward=FEEDFORWARD, vocabulary_size=VOCABULARY,
                         length=LENGTH, query_layer=False, remat="none", scan_unroll=LAYERS, **MODELS[model])


def ours(model_name: str, directory: str) -> Callable[[], None]:
    import jax
    import optax
    from flax import linen as nn

    from codellm_jax.mixture.batches import global_batch, read_ahead
    from codellm_jax.mixture.mixture import Mixture, open_mixture
    from codellm_jax.model.decoder import Decoder
    from codellm_jax.runtime.optimization import adamw
    from codellm_jax.runtime.partitioning import MeshShape, batch_sharding, make_mesh
    from codellm_jax.runtime.state import abstract_state, initial_state
    from codellm_jax.training.train import train_step
    from codellm_jax.vocabulary import load_vocabulary
    from tasks import Definitions

    vocabulary = load_vocabulary()
    mixture = open_mixture(
        Mixture("python_text_code", Definitions(), {"targets": LENGTH}, 1 / 3, cache_dir=directory),
        vocabulary, seed=0, total_rows=10**6, report=lambda _: None)
    shape = MeshShape()
    mesh = make_mesh(shape)
    model, optimizer = Decoder(our_config(model_name)), adamw(optax.constant_schedule(1e-3))
    abstract = abstract_state(model, optimizer, mesh, shape)
    jax.set_mesh(mesh)
    rules = nn.logical_axis_rules(shape.all_rules())
    rules.__enter__()
    state = initial_state(model, optimizer, abstract, seed=0)
    step_fn = jax.jit(
        functools.partial(train_step, model=model, optimizer=optimizer, sources=len(mixture.order.sources)),
        donate_argnums=0, out_shardings=(jax.tree.map(lambda leaf: leaf.sharding, abstract), None))
    batches = read_ahead(functools.partial(
        global_batch, batch_size=BATCH, order=mixture.order, rows=mixture.training,
        end_of_document_id=vocabulary.end_of_document_id, sharding=batch_sharding(mesh)), 0, 10**6)

    def step() -> None:
        nonlocal state
        batch, _ = next(batches)
        state, metrics = step_fn(state, batch)
        jax.device_get(metrics)

    return step


def plain_flax(model_name: str, directory: str) -> Callable[[], None]:
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax
    from flax.training.train_state import TrainState

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, mask):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=HEADS)(y, y, mask=mask)
            y = nn.LayerNorm()(x)
            return x + nn.Dense(HIDDEN)(nn.gelu(nn.Dense(FEEDFORWARD)(y)))

    class GPT(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(VOCABULARY, HIDDEN)
            x = embed(tokens) + nn.Embed(LENGTH, HIDDEN)(jnp.arange(LENGTH))
            mask = nn.make_causal_mask(tokens)
            for _ in range(LAYERS):
                x = Block()(x, mask)
            return embed.attend(nn.LayerNorm()(x))

    model = GPT()
    tokens = jax.random.randint(jax.random.key(0), (BATCH, LENGTH + 1), 0, VOCABULARY)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(1), inputs)["params"],
        tx=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, b2=0.95, weight_decay=0.1)))

    @functools.partial(jax.jit, donate_argnums=0)
    def step_fn(state, inputs, targets):
        def loss_fn(params):
            logits = state.apply_fn({"params": params}, inputs)
            return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    def step() -> None:
        nonlocal state
        state, loss = step_fn(state, inputs, targets)
        jax.device_get(loss)

    return step


def plain_torch(model_name: str, directory: str, compiled: bool = False) -> Callable[[], None]:
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
            self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
            self.up, self.down = nn.Linear(HIDDEN, FEEDFORWARD), nn.Linear(FEEDFORWARD, HIDDEN)

        def forward(self, x):
            q, k, v = (part.view(BATCH, LENGTH, HEADS, -1).transpose(1, 2)
                       for part in self.qkv(self.norm1(x)).split(HIDDEN, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(BATCH, LENGTH, HIDDEN))
            return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(VOCABULARY, HIDDEN), nn.Embedding(LENGTH, HIDDEN)
            self.blocks, self.norm = nn.ModuleList([Block() for _ in range(LAYERS)]), nn.LayerNorm(HIDDEN)

        def forward(self, tokens, targets):
            x = self.tokens(tokens) + self.positions.weight
            for block in self.blocks:
                x = block(x)
            logits = self.norm(x) @ self.tokens.weight.T
            return F.cross_entropy(logits.view(-1, VOCABULARY), targets.reshape(-1))

    model = GPT()
    matrices, others = ([p for p in model.parameters() if (p.dim() > 1) == decayed] for decayed in (True, False))
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                  lr=1e-3, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    compute_loss = torch.compile(model, fullgraph=True) if compiled else model

    def step() -> None:
        loss = compute_loss(inputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step


def transformers(model_name: str, directory: str, compiled: bool = False) -> Callable[[], None]:
    import torch
    from torch.nn import functional as F
    from transformers import LlamaConfig, LlamaForCausalLM

    from codellm_jax.model.decoder import parameter_count

    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    config = our_config(model_name)
    model = LlamaForCausalLM(LlamaConfig(
        num_hidden_layers=LAYERS, hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=config.key_heads,
        intermediate_size=FEEDFORWARD, vocab_size=VOCABULARY, max_position_embeddings=LENGTH, use_cache=False,
        attn_implementation="sdpa", tie_word_embeddings=False))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameter_count(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].reshape(-1)

    def compute_loss(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(input_ids=inputs).logits.view(-1, VOCABULARY), targets)

    if compiled:
        compute_loss = torch.compile(compute_loss, fullgraph=True)

    def step() -> None:
        loss = compute_loss(inputs, targets)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        loss.item()

    return step


def matmul(model_name: str, directory: str) -> Callable[[], None]:
    """As many FLOPs as the step's matmuls, in square matmuls of 2048."""
    import jax
    import jax.numpy as jnp

    from codellm_jax.model.decoder import products_of_block

    products = LAYERS * sum(products_of_block(our_config(model_name))) + HIDDEN * VOCABULARY
    times = round(BATCH * LENGTH * 6 * products / (2 * 2048**3))
    a = jax.random.normal(jax.random.key(0), (2048, 2048))

    @jax.jit
    def run(a):
        return jax.lax.fori_loop(0, times, lambda _, x: jnp.tanh(a @ x), a)

    def step() -> None:
        jax.block_until_ready(run(a))

    return step


OF_LLAMA = {"ours": ours, "transformers": transformers,
            "compiled": functools.partial(transformers, compiled=True), "matmul": matmul}
CONTENDERS: dict[str, dict[str, Callable[[str, str], Callable[[], None]]]] = {
    "gpt": {"ours": ours, "plain flax": plain_flax, "plain torch": plain_torch,
            "compiled torch": functools.partial(plain_torch, compiled=True), "matmul": matmul},
    "llama": OF_LLAMA, "grouped": OF_LLAMA}


def serve(model_name: str, name: str, directory: str, connection: Connection) -> None:
    if name == "ours":
        from codellm_jax.runtime.process import keep_freed_memory

        keep_freed_memory()  # as `t5x train` does
    step = CONTENDERS[model_name][name](model_name, directory)
    for _ in range(3):
        step()
    connection.send("ready")
    while (steps := connection.recv()) is not None:
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
        connection.send(statistics.median(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="gpt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="steps of a turn")
    flags = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        workers, processes = {}, []
        for name in CONTENDERS[flags.model]:
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(flags.model, name, directory, there), daemon=True)
            process.start()
            there.close()
            try:
                here.recv()  # one at a time, since compiling disturbs the others
            except EOFError:
                sys.exit(f"The contender {name!r} did not start; its error is above.")
            workers[name] = here
            processes.append(process)
        medians: dict[str, list[float]] = {name: [] for name in workers}
        for turn in range(flags.rounds):
            for name, worker in workers.items():
                worker.send(flags.steps)
                medians[name].append(worker.recv())
            print(f"turn {turn + 1}/{flags.rounds}: "
                  + "  ".join(f"{name} {seconds[-1]:.3f} s" for name, seconds in medians.items()), flush=True)
        for worker in workers.values():
            worker.send(None)
        for process in processes:
            process.join()
    print(f"\n{'':<14}{'median step':>12}{'time / ours':>13}{'spread':>16}")
    for name, seconds in medians.items():
        ratios = [theirs / mine for theirs, mine in zip(seconds, medians["ours"], strict=True)]
        print(f"{name:<14}{statistics.median(seconds):>10.3f} s{statistics.median(ratios):>13.3f}"
              f"{min(ratios):>9.3f}-{max(ratios):.3f}")


if __name__ == "__main__":
    main()
