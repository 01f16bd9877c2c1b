"""The README of an exported model: a model card, made from the records of the checkpoint. It makes no claim on quality.
"""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from codellm_jax.mixture.ledger import arm
from codellm_jax.model.config import DecoderConfig
from codellm_jax.model.decoder import parameter_count
from codellm_jax.runtime.provenance import is_free_on_resume

# Settings of the package's own wiring, which say nothing about a run.
REFERENCES = ("%", "@")


def model_card(
    config: DecoderConfig, facts: Mapping[str, Any], dtype: str, record: Mapping[str, Any],
    code: Mapping[str, Any] | None,
) -> str:
    """Returns Markdown with a YAML header.

    Args:
      config: the decoder.
      facts: the content of its config.json.
      dtype: of the tensors.
      record: of the checkpoint: "step", "settings", "ledger", and "digest" if the checkpoint was saved.
      code: the version and commit that it was trained with, as far as known.
    """
    ledger, own = record["ledger"], facts["model_type"] == "codellm"
    stages = [*ledger.get("before", []), ledger]
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- codellm_jax",
        f"- {facts['model_type']}", *(["- custom_code"] if own else []),
        *dict.fromkeys(f"- {stage['stage']}" for stage in stages), "---", "",
        f"# A decoder of {parameter_count(config):,} parameters", "",
        "Exported by codellm_jax " + ("as it was imported" if ledger["stage"] == "imported" else
                                      f"after step {record['step']:,} of its last stage, {ledger['stage']}") + ". "
        f"It belongs to the family `{facts['model_type']}`"
        + (", whose code is in this folder." if own else ", which transformers supports."), "",
        "## Sizes", "", *_table(("what", "value"), _sizes(config, dtype)), "",
        "## Training data", "",
        *([f"Arm of the study: {arm(ledger)}.", ""] if ledger["stage"] != "imported" else [])]
    for number, stage in enumerate(stages, 1):
        # An earlier stage records its step; the step of the last stage is the checkpoint's.
        lines += [*_stage(number, stage, stage.get("step", record["step"])), ""]
    lines += ["## Provenance", "", *_table(("what", "value"), _provenance(record, code)), "",
              "<details><summary>Settings of the last stage that affect the computation</summary>", "",
              "```", *_settings(record["settings"]), "```", "", "</details>", "",
              "## How to use it", "", *_use(own), ""]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    """The lines of a table; texts are escaped so that they cannot break it."""
    yield f"| {' | '.join(head)} |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in row) + " |"


def _sizes(config: DecoderConfig, dtype: str) -> list[tuple[str, Any]]:
    keys = f", {config.key_heads} of keys and values" if config.key_heads < config.heads else ""
    return [
        ("layers", f"{config.layers}{', including the query layer' if config.query_layer else ''}"),
        ("hidden size", f"{config.hidden:,}"), ("heads", f"{config.heads}{keys}, of {config.size_of_head}"),
        ("feed-forward size", f"{config.feedforward:,} ({config.activation})"),
        ("norm", f"{config.norm}, {config.norm_place} each sub-layer, residual {config.residual}"),
        ("positions", f"{config.length:,}, {config.positions}"),
        ("rows of the embedding", f"{config.vocabulary_size:,}"), ("head", "tied" if config.tied_head else "untied"),
        ("dtype of the tensors", dtype)]


def _stage(number: int, ledger: Mapping[str, Any], step: int) -> list[str]:
    """The data of a stage: a row for each of its sources."""
    if ledger["stage"] == "imported":
        source = ledger["source"] if "://" in ledger["source"] else pathlib.PurePath(ledger["source"]).name
        files = [(name, f"{facts['bytes']:,} bytes, SHA-256 {facts.get('sha256', 'not computed')}")
                 for name, facts in ledger["files"].items()]
        return [f"### {number}. imported", "", "Its earlier training data is unknown here.", "",
                *_table(("what", "value"), [("source", source), ("revision", ledger["revision"] or "none"),
                                            ("family", ledger["model_type"]), *files])]
    unit = "examples" if ledger["stage"] == "tuning" else "rows"
    total = max(1, sum(ledger["rows"].values()))
    sizes = ledger.get("epoch_rows", {})
    rows = [(name, f"{drawn:,}", f"{ledger['tokens'][name]:,}",
             f"{drawn / sizes[name]:.2f}" if sizes.get(name) else "not known", f"{drawn / total:.4f}")
            for name, drawn in ledger["rows"].items()]
    lines = [f"### {number}. {ledger['stage']}, {step:,} steps, rows of {ledger['length']:,} tokens", "",
             *_table(("source", unit, "tokens", "epochs", "realised share"), rows)]
    phases = [(f"{phase['start']:,}", f"{sum(phase['rows'].values()):,}", f"{_share_of_code(phase['rows']):.4f}")
              for phase in ledger.get("phases", []) if any(phase["rows"].values())]
    if len(phases) > 1:
        lines += ["", *_table((f"phase, from the {unit[:-1]}", unit, "realised share of code"), phases)]
    return lines


def _share_of_code(rows: Mapping[str, int]) -> float:
    return sum(count for name, count in rows.items() if name.startswith("code.")) / sum(rows.values())


def _provenance(record: Mapping[str, Any], code: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    code = code or {}
    commit = code.get("commit", "unknown") + (", with uncommitted changes" if code.get("dirty") else "")
    ledger, settings = record["ledger"], record["settings"]
    before = [(f"checkpoint of stage {number}", f"{pathlib.PurePath(stage['model_dir']).name}, step {stage['step']:,}, "
               f"digest {stage['digest']}") for number, stage in enumerate(ledger.get("before", []), 1)
              if "digest" in stage and "model_dir" in stage]
    return [
        ("codellm_jax", f"version {code.get('version', 'not known')}, commit {commit}"),
        ("seed", settings.get("SEED", settings.get("train.seed", "not known"))),
        *before,
        ("checkpoint", f"step {record['step']:,}, digest {record['digest']}" if "digest" in record else
         f"step {record['step']:,}, written while training"),
        ("vocabulary, SHA-256", ledger["vocabulary_hash"]),
        *([("order of the data", ledger["order_fingerprint"])] if ledger.get("order_fingerprint") else [])]


def _settings(settings: Mapping[str, str]) -> list[str]:
    return [f"{name} = {value}".replace("```", "'''") for name, value in settings.items()
            if not is_free_on_resume(name) and not str(value).startswith(REFERENCES)]


def _use(own: bool) -> list[str]:
    argument = ", trust_remote_code=True" if own else ""
    return ["```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            'folder = "."  # the folder of this file', f"tokenizer = AutoTokenizer.from_pretrained(folder{argument})",
            f"model = AutoModelForCausalLM.from_pretrained(folder{argument})",
            'inputs = tokenizer("def add(a, b):", return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))", "```"]
