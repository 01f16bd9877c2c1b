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
    "TransformerConfig.num_layers": "model.layers",
    "TransformerConfig.num_decoder_layers": "model.layers",
    "TransformerConfig.emb_dim": "model.hidden",
    "TransformerConfig.num_heads": "model.heads",
    "TransformerConfig.head_dim": "model.head_size",
    "TransformerConfig.mlp_dim": "model.feedforward",
    "TransformerConfig.dropout_rate": "DROPOUT_RATE",
    "TransformerConfig.dtype": "model.dtype",
    "create_learning_rate_scheduler.base_learning_rate": "LEARNING_RATE",
    "create_learning_rate_scheduler.warmup_steps": "WARMUP_STEPS",
    "create_learning_rate_scheduler.factors": "train.learning_rate",
}
FLAGS = {
    "--tfds_data_dir": "TFDS's own environment variable, TFDS_DATA_DIR; --gin.DATA_DIR=DIR names the folder of "
                       "official "
                       "files",
    "--seqio_additional_cache_dirs": "--gin.CACHE_DIR=DIR",
    "--multiprocess_gpu": "not needed: if JAX does not find the other processes itself, give --coordinator_address, "
                          "--process_count and --process_index",
    "--initialization_timeout": "not there",
    "--alsologtostderr": "not needed: progress is printed; --debug shows the traceback of an error",
    "--logtostderr": "not needed: progress is printed; --debug shows the traceback of an error",
    "--verbosity": "--debug, which shows the traceback of an error",
}
COMMANDS = {
    "pretrain": "t5x train --gin_file=gin/mixed_pretrain.gin",
    "finetune": "t5x train --gin_file=gin/tune_mixed.gin --gin.INITIAL_CHECKPOINT_PATH=RUN",
    "inspect_checkpoint": "to inspect a run, RUN/config.gin and RUN/provenance.json; for its tensors, t5x export "
                          "RUN --output=DIR",
    "convert_tf_checkpoint": "t5x import SOURCE --output=RUN, which reads weights for Hugging Face's libraries",
}


def of_setting(name: str) -> str | None:
    """The end of a message about one of T5X's settings, with or without scope and module; None for other names."""
    last = ".".join(name.split("/")[-1].split(".")[-2:])
    return _told(last, SETTINGS.get(last))


def of_flag(flag: str) -> str | None:
    """The same for one of T5X's flags."""
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
    return (f"{file} is a gin file of upstream T5X: give it to python -m t5x.train. Here gin/mixed_pretrain.gin, "
            "gin/tune_mixed.gin and gin/eval.gin replace T5X's; t5x train --runner=t5x trains with T5X's trainer.")


def _told(name: str, ours: str | None) -> str | None:
    return ours and f"; here T5X's {name} is {ours}."
