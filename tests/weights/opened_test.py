"""What was exported, opened by transformers: logits, greedy text, losses and gradients equal ours."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codellm_jax.evaluation.decoding import generate
from codellm_jax.evaluation.sampling import Sampling
from codellm_jax.model.decoder import Decoder, DecoderConfig
from codellm_jax.weights.exporting import export

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

LENGTH = 14


@pytest.fixture(autouse=True)
def modules_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies a folder's own code into its cache."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def logits_of(config: DecoderConfig, params: Any, tokens_BL: Any) -> jax.Array:
    positions_BL = jnp.tile(jnp.arange(tokens_BL.shape[1], dtype=jnp.int32), (len(tokens_BL), 1))

    @jax.jit
    def compute(params: Any) -> jax.Array:
        hidden_BLD = Decoder(config).apply({"params": params}, tokens_BL, positions_BL, jnp.zeros_like(tokens_BL))
        return Decoder(config).apply({"params": params}, hidden_BLD, method="logits")

    return compute(params)


def opened(folder: Path, attention: str = "sdpa") -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, attn_implementation=attention)
    return model.eval()


def test_logits_and_greedy_text_equal_ours(
    decoder: tuple[str, dict[str, Any]], save_run: Callable[..., Any], tmp_path: Path
) -> None:
    family, values = decoder
    run, config, params = save_run(values)
    export(str(run), str(tmp_path / "out"), report=lambda line: None)
    model = opened(tmp_path / "out")
    assert model.config.model_type == family and model.config.vocab_size == config.vocabulary_size
    tokens_BL = np.random.default_rng(0).integers(3, 8000, (2, LENGTH), dtype=np.int32)
    expected_BLV = np.asarray(logits_of(config, params, tokens_BL))
    with torch.no_grad():
        found_BLV = model(torch.tensor(tokens_BL, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(found_BLV, expected_BLV, atol=1e-4 * max(1, np.abs(expected_BLV).max()), rtol=0)
    if family != "codellm":  # the rest is transformers' own
        return
    # Prompts of several lengths in one batch, padded on the left, with the cache.
    prompts = [tokens_BL[0, :9].tolist(), tokens_BL[1, :4].tolist(), tokens_BL[0, 3:4].tolist()]
    ours = generate(params, config, prompts, Sampling(max_new_tokens=6, temperature=0.0))
    longest = max(map(len, prompts))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    with torch.no_grad():
        theirs = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert theirs[:, longest:].tolist() == [generation.ids for generation in ours]


def test_our_own_code_has_both_attentions_gradients_and_saves_again(
    own_decoder: tuple[str, dict[str, Any]], save_run: Callable[..., Any], tmp_path: Path
) -> None:
    run, config, params = save_run(own_decoder[1])
    export(str(run), str(tmp_path / "out"), report=lambda line: None)
    tokens_BL = np.random.default_rng(0).integers(3, 8000, (2, LENGTH), dtype=np.int32)

    def loss_of(params: Any) -> jax.Array:
        of_tokens = jax.nn.log_softmax(logits_of(config, params, tokens_BL)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(of_tokens, tokens_BL[:, 1:, None], axis=-1))

    loss, gradients = jax.jit(jax.value_and_grad(loss_of))(params)
    ids = torch.tensor(tokens_BL, dtype=torch.long)
    for attention in ("eager", "sdpa"):
        model = opened(tmp_path / "out", attention)
        assert model.config._attn_implementation == attention
        output = model(ids, labels=ids)
        assert math.isclose(output.loss.item(), loss, rel_tol=1e-5)
        output.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        np.testing.assert_allclose(model.transformer.wte.weight.grad.numpy(), gradients["token_embedding"], atol=1e-4)
        block = gradients["query_block" if config.query_layer else "blocks"]["attention"]["query_kernel"]
        np.testing.assert_allclose(model.transformer.h[-1].attn.q_proj.weight.grad.numpy().T,
                                   block if config.query_layer else block[-1], atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    again = opened(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        # What is cached is seen as if it came at once, also where a sequence goes on by several tokens.
        first = model(ids[:, :5], use_cache=True)
        cache = getattr(first, "cache", None) or first.past_key_values
        rest = model(ids[:, 5:], past_key_values=cache).logits
        torch.testing.assert_close(rest, model(ids).logits[:, 5:], atol=1e-4, rtol=1e-4)


def test_the_harness_scores_an_export_as_it_scores_the_run(pretrained: Path, tmp_path: Path) -> None:
    """lm-evaluation-harness by its own model `hf`, and by ours."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    theirs_of = pytest.importorskip("lm_eval.models.huggingface")  # which needs accelerate
    from lm_eval.api.instance import Instance

    from codellm_jax.evaluation.harness import CodellmJax

    export(str(pretrained / "CODE"), str(tmp_path / "out"), report=lambda line: None)
    pairs = [("a row of tokens", " is read"), ("a row of tokens", " is never lost"), ("", "schedule"),
             ("def function_7(value):\n    value = value", " * 3 + a1\n"), ("héllo 世界 😀", " order  position"),
             ("the row of tokens " * 20, " is read")]
    texts = ["the share of a ledger is read by its number " * 5, "def f(x):\n\treturn x\n"]
    asked = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    asked_whole = [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]
    model = CodellmJax(checkpoint=str(pretrained / "CODE"))
    with model._open:  # its mesh would hold for the tests behind
        ours, ours_whole = model.loglikelihood(asked), model.loglikelihood_rolling(asked_whole)
    model = theirs_of.HFLM(pretrained=str(tmp_path / "out"), trust_remote_code=True, device="cpu", batch_size=2)
    theirs, theirs_whole = model.loglikelihood(asked), model.loglikelihood_rolling(asked_whole)
    for (value, greedy), (expected, expected_greedy) in zip(theirs, ours, strict=True):
        assert value == pytest.approx(expected, rel=1e-5) and greedy == expected_greedy
    np.testing.assert_allclose(theirs_whole, ours_whole, rtol=1e-5)


def test_the_tokenizer_gives_our_ids(save_run: Callable[..., Any], tmp_path: Path, vocabulary: Any) -> None:
    run, _, _ = save_run({})
    export(str(run), str(tmp_path / "out"), report=lambda line: None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in ("def f(x):\n\treturn  x + 1\n", "héllo 世界 😀", "  <|pad|> <|endofdocument|>", ""):
        assert tokenizer(text)["input_ids"] == vocabulary.encode(text)
        assert tokenizer.decode(vocabulary.encode(text)) == text
    assert set(tokenizer("x")) == {"input_ids", "attention_mask"}
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (vocabulary.end_of_document_id, vocabulary.pad_id)
