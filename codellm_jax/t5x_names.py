"""Upstream T5X's names of settings, flags and commands, and their equivalents here.

Used only for error lines: a setting has one name here, and `t5x explain` prints what set it.
"""

from collections.abc import Sequence

# T5X's macros, and its parameters by class or function without their module.
SETTINGS = {
    "MIXTURE_OR_TASK_MODULE": "TASK_MODULES, a list of modules",
    "MIXTURE_OR_TASK_NAME": "TASKS in evaluation, a list of benchmarks",
    "RANDOM_SEED": "SEED",
    "USE_CACHED_TASKS": "not needed: rows are always cached, in CACHE_DIR",
    "SHUFFLE_TRAIN_EXAMPLES": "not needed: rows are always drawn in an order that SEED shuffles",
    "TRAIN_STEPS_RELATIVE": "TRAIN_STEPS, which a tuning run counts from its own start",
    "EVAL_OUTPUT_DIR": "evaluate.results_dir, by default CHECKPOINT_PATH/results",
    "INFER_OUTPUT_DIR": "the flag --output=FILE",
    "USE_HARDWARE_RNG": "not supported: the same seed gives the same numbers",
    "LOSS_NORMALIZING_FACTOR": "not supported: the loss is the mean over the tokens that count",
    "LABEL_SMOOTHING": "not there",
    "Z_LOSS": "not there",
    "EVAL_STEPS": "train.eval_rows, in rows",
    "EVALUATOR_USE_MEMORY_CACHE": "not there",
    "EVALUATOR_NUM_EXAMPLES": "QUESTIONS in evaluation",
    "JSON_WRITE_N_RESULTS": "not needed: the answer to every question is written",
    "ACTIVATION_PARTITIONING_DIMS": "mesh.rules",
    "PARAMETER_PARTITIONING_DIMS": "mesh.fsdp",
    "MODEL": "model.layers, model.hidden and others, as the files of gin/models/ set them",
    "OPTIMIZER": "train.optimizer",
    "DatasetConfig.mixture_or_task_name": "MIXTURE_OR_TASK_NAME",
    "DatasetConfig.task_feature_lengths": "TASK_FEATURE_LENGTHS",
    "DatasetConfig.batch_size": "BATCH_SIZE",
    "DatasetConfig.seed": "SEED",
    "DatasetConfig.module": "TASK_MODULES, a list of modules",
    "DatasetConfig.pack": "PACKING in tuning; rows of documents are always full",
    "DatasetConfig.shuffle": "not needed: rows are always drawn in an order that SEED shuffles",
    "DatasetConfig.use_cached": "not needed: rows are always cached, in CACHE_DIR",
    "DatasetConfig.split": "not supported: a corpus's 'holdout' and 'validation' in CORPORA split it",
    "Trainer.num_microbatches": "train.microbatches",
    "Trainer.learning_rate_fn": "train.learning_rate",
    "PjitPartitioner.num_partitions": "mesh.model",
    "PjitPartitioner.model_parallel_submesh": "mesh.model",
    "PjitPartitioner.logical_axis_rules": "mesh.rules",
    "SaveCheckpointConfig.period": "CHECKPOINT_PERIOD",
    "SaveCheckpointConfig.keep": "train.keep_last",
    "SaveCheckpointConfig.checkpoint_steps": "KEEP_STEPS",
    "SaveCheckpointConfig.save_dataset": "not needed: a resumed run computes its position in the data from the step",
    "RestoreCheckpointConfig.path": "INITIAL_CHECKPOINT_PATH in training, CHECKPOINT_PATH in evaluation",
    "CheckpointConfig.save": "CHECKPOINT_PERIOD, train.keep_last and KEEP_STEPS",
    "CheckpointConfig.restore": "INITIAL_CHECKPOINT_PATH",
    "train.total_steps": "TRAIN_STEPS",
    "train.eval_steps": "train.eval_rows, in rows",
    "train.stats_period": "LOG_PERIOD",
    "train.random_seed": "SEED",
    "train.use_hardware_rng": "not supported: the same seed gives the same numbers",
    "train.partitioner": "mesh.data, mesh.fsdp, mesh.model and mesh.rules",
    "train.trainer_cls": "the flag --runner: --runner=t5x takes T5X's Trainer",
    "train.checkpoint_cfg": "CHECKPOINT_PERIOD, train.keep_last and INITIAL_CHECKPOINT_PATH",
    "train.train_dataset_cfg": "MIXTURE_OR_TASK_NAME, TASK_FEATURE_LENGTHS and BATCH_SIZE",
    "train.train_eval_dataset_cfg": "not needed: held-out rows of the mixture's own sources, train.eval_rows of each",
    "train.infer_eval_dataset_cfg": "EVAL_TASKS",
    "train.inference_evaluator_cls": "EVAL_TASKS",
    "train.use_orbax": "not needed: Orbax writes all checkpoints",
    "train.run_eval_before_training": "not there",
    "train.actions": "not there",
    "train.hooks": "not there",
    "train.gc_period": "not there",
    "infer.mode": "not there: t5x infer writes text, and t5x eval scores answers",
    "infer.output_dir": "the flag --output=FILE",
    "evaluate.output_dir": "evaluate.results_dir, by default CHECKPOINT_PATH/results",
    **{f"{config}.{name}": ours for config in ("TransformerConfig", "T5Config") for name, ours in {
        "num_layers": "model.layers", "num_decoder_layers": "model.layers", "emb_dim": "model.hidden",
        "num_heads": "model.heads", "head_dim": "model.head_size", "mlp_dim": "model.feedforward",
        "dropout_rate": "DROPOUT_RATE", "dtype": "model.dtype"}.items()},
    "create_learning_rate_scheduler.base_learning_rate": "LEARNING_RATE",
    "create_learning_rate_scheduler.warmup_steps": "WARMUP_STEPS",
    "create_learning_rate_scheduler.factors": "train.learning_rate",
}
# Its classes and functions, for parameters that are not listed above.
CLASSES = {
    "DatasetConfig": "MIXTURE_OR_TASK_NAME, TASK_FEATURE_LENGTHS and BATCH_SIZE",
    "SaveCheckpointConfig": "CHECKPOINT_PERIOD, train.keep_last and KEEP_STEPS",
    "RestoreCheckpointConfig": "INITIAL_CHECKPOINT_PATH in training, CHECKPOINT_PATH in evaluation",
    "CheckpointConfig": "CHECKPOINT_PERIOD, train.keep_last and INITIAL_CHECKPOINT_PATH",
    "PjitPartitioner": "mesh.data, mesh.fsdp, mesh.model and mesh.rules",
    "standard_logical_axis_rules": "mesh.rules",
    "Trainer": "the flag --runner: --runner=t5x takes T5X's",
    "TransformerConfig": "model.layers, model.hidden and others, as the files of gin/models/ set them",
    "T5Config": "model.layers, model.hidden and others, as the files of gin/models/ set them",
    "BaseTransformerModel": "model.layers, model.hidden and others; only decoders are trained here",
    "DecoderOnlyModel": "model.layers, model.hidden and others, as the files of gin/models/ set them",
    "EncoderDecoderModel": "not there: only decoders are trained here",
    "EncoderOnlyModel": "not there: only decoders are trained here",
    "Adafactor": "train.optimizer, such as @optax.adafactor",
    "OptaxWrapper": "train.optimizer, which takes optax's functions as they are",
    "create_learning_rate_scheduler": "train.learning_rate",
    "InferenceEvaluator": "EVAL_TASKS",
    "Evaluator": "EVAL_TASKS",
    "temperature_sample": "sampling.temperature and others, as gin/infer.gin sets them",
    "beam_search": "not there: answers are drawn or greedy",
}
FLAGS = {
    "--tfds_data_dir": "TFDS's own environment variable, TFDS_DATA_DIR; --gin.DATA_DIR=DIR names the folder of "
                       "official files",
    "--seqio_additional_cache_dirs": "--gin.CACHE_DIR=DIR",
    "--multiprocess_gpu": "not needed: if JAX does not find the other processes itself, give --coordinator_address, "
                          "--process_count and --process_index",
    "--initialization_timeout": "not there",
    **dict.fromkeys(("--alsologtostderr", "--logtostderr", "--verbosity", "--v", "-v", "--vmodule", "--stderrthreshold",
                     "--log_dir"), "not needed: progress is printed; --debug shows the traceback of an error"),
    "--run_mode": "the sub-command: t5x train, t5x eval or t5x infer",
    "--helpfull": "--help",
}
COMMANDS = {
    "pretrain": "t5x train --gin_file=gin/mixed_pretrain.gin",
    "finetune": "t5x train --gin_file=gin/tune_mixed.gin --gin.INITIAL_CHECKPOINT_PATH=RUN",
    "inspect_checkpoint": "to inspect a run, RUN/config.gin and RUN/provenance.json; for its tensors, t5x export "
                          "RUN --output=DIR",
    "convert_tf_checkpoint": "t5x import SOURCE --output=RUN, which reads weights for Hugging Face's libraries",
}


def of_setting(name: str) -> str | None:
    """The end of a message about one of T5X's settings or classes, with or without scope and module; None for other
    names.
    """
    parts = name.split("/")[-1].split(".")
    last = ".".join(parts[-2:])
    if last in SETTINGS:
        return _told(last, SETTINGS[last])
    return next((_told(part, CLASSES[part]) for part in parts[-2:] if part in CLASSES), None)


def of_flag(flag: str) -> str | None:
    """The same for one of T5X's flags, or of JAX's, which T5X accepts."""
    if flag.startswith("--jax_"):
        return f"; JAX reads it from the environment, as {flag[2:].upper()}=VALUE."
    return _told(flag, FLAGS.get(flag))


def of_command(arguments: Sequence[str]) -> str | None:
    """A message about one of T5X's commands; None for all others."""
    if not arguments:
        return None
    if arguments[0] == "export" and any(argument.startswith("--gin") for argument in arguments):
        return "t5x export writes for Hugging Face's libraries and takes no gin files: t5x export RUN --output=DIR."
    ours = COMMANDS.get(arguments[0])
    return ours and f"here T5X's {arguments[0]} is {ours}."


def of_gin_file(file: str) -> str:
    """A message about one of T5X's gin files, recognised by its imports."""
    return (f"{file} is a gin file of upstream T5X, for python -m t5x.train, t5x.eval or t5x.infer. Here gin/"
            "mixed_pretrain.gin, gin/tune_mixed.gin, gin/eval.gin and gin/infer.gin replace T5X's; t5x train "
            "--runner=t5x trains with T5X's trainer.")


def _told(name: str, ours: str | None) -> str | None:
    return ours and f"; here T5X's {name} is {ours}."
